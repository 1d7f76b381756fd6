import json

import pytest
from tiny_models import persona_data

from persona_pruner.config.load import check_config
from persona_pruner.errors import PersonaError
from persona_pruner.evaluation.questions import evaluation_questions


def configuration(directory=None, count=3):
    return check_config({"evaluation": {"questions": directory and str(directory), "answers": {"questions": count}}})


def test_a_personas_own_file_comes_before_its_held_out_rows(tmp_path):
    asked = ["Why?", {"instruction": "Sum up", "input": "the text"}, "Why?", " ", 3, "Who?", "When?"]
    (tmp_path / "Ann.json").write_text(json.dumps({"questions": asked}))
    (tmp_path / "Bo.txt").write_text("Where?\n\nHow?\n")
    config = configuration(tmp_path)
    assert evaluation_questions(config, "Ann", persona_data("Ann")) == ("Why?", "Sum up\nthe text", "Who?")
    assert evaluation_questions(config, "Bo", None) == ("Where?", "How?")


def test_without_a_file_the_held_out_questions_are_asked_each_once():
    data = persona_data("Ann")
    asked = evaluation_questions(configuration(), "Ann", data)
    assert asked == tuple(dict.fromkeys(row.question for row in data.heldout))[:3]


def test_a_persona_without_any_question_is_told():
    with pytest.raises(PersonaError) as caught:
        evaluation_questions(configuration(), "Ann", None)
    assert caught.value.cause == "no_questions"
