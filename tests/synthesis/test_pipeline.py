import json

import pytest
import tiny_models

from persona_pruner.config.load import check_config
from persona_pruner.errors import BackboneError, PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.pipeline import evaluation_questions, synthesize


@pytest.fixture(params=["local", "bucket"])
def questions(request, tmp_path):
    storage = open_storage(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")
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


def test_what_stops_the_scoring_actors_is_one_line(tmp_path):
    import ray

    (tmp_path / "q.jsonl").write_text('{"instruction": "Why?", "input": "", "output": "So."}\n')
    synthesis = {"sources": [{"path": str(tmp_path / "q.jsonl")}], "max_prompt_tokens": 20}
    path = str(tiny_models.save_tiny(tmp_path / "tiny"))
    config = check_config({"backbone": {"path": path}, "synthesis": synthesis})
    people = [Persona(name, f"{name}, a sailor") for name in ("Ann", "Bo", "Cy")]
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with pytest.raises(BackboneError) as caught:
            list(synthesize(config, people, ["Ann"], str(tmp_path / "out"), people))
    finally:
        ray.shutdown()
    assert str(caught.value) == (
        "0 of 3 reference personas fit in 10 tokens, half of synthesis.max_prompt_tokens; "
        "raise it, or shorten the descriptions"
    )
