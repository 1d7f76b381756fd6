import json

import pytest

from persona_pruner.config import check_config
from persona_pruner.errors import PersonaError
from persona_pruner.storage import open_storage
from persona_pruner.synthesis.pipeline import evaluation_questions


@pytest.fixture(params=["local", "moto_mock"])
def questions(request, tmp_path):
    storage = open_storage(tmp_path) if request.param == "local" else request.getfixturevalue("mock_bucket")
    storage.put("ada.json", json.dumps({"questions": ["What  now?", "Why?"]}).encode())
    storage.put("bo.txt", b"What now?\nWho?")
    storage.put("cy.json", b"{")
    return storage.url


def test_evaluation_questions_are_found_wherever_they_are(questions):
    config = check_config({"evaluation": {"questions": questions}}, "test")
    assert evaluation_questions(config, "ada") == {"What now?", "Why?"}
    assert evaluation_questions(config, "bo") == {"What now?", "Who?"}
    assert evaluation_questions(config, "dee") == set()
    with pytest.raises(PersonaError, match=r"cy\.json: not readable"):
        evaluation_questions(config, "cy")
