import torch

from persona_pruner.config.load import check_config
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.selection import Selection, score_and_select
from persona_pruner.synthesis.sources import Question, question_id

QUESTIONS = [Question(question_id(text), text, None) for text in "abcdefghij"]
ADA, BO = Persona("ada", "Ada, a pilot"), Persona("bo", "Bo")


class Scorer:
    """Ada's scores rise with the question's number, the last has none; Bo's description is too long."""

    def tile(self, personas):
        scores = torch.arange(10.0)
        scores[9] = torch.nan
        return [(ADA, scores), (BO, PersonaError("prompt_too_long", "the description is too long"))]


def test_a_tile_gives_the_best_and_the_least_questions_or_what_is_wrong():
    config = check_config({"synthesis": {"select": {"k": 3}}})
    ada, bo = score_and_select(config, Scorer(), QUESTIONS, [ADA, BO])
    assert ada.chosen == ((8, 8.0), (7, 7.0), (6, 6.0))
    assert ada.least == tuple((n, float(n)) for n in range(5))
    assert ada.left_out == 1
    assert bo.error.cause == "prompt_too_long"
    assert bo.chosen == ()


def test_unreadable_evaluation_questions_are_the_personas_error(tmp_path):
    (tmp_path / "ada.json").write_text("{")
    config = check_config({"evaluation": {"questions": str(tmp_path)}})
    ada, _ = score_and_select(config, Scorer(), QUESTIONS, [ADA, BO])
    assert ada.error.cause == "evaluation_questions"


def test_a_selection_travels_as_json():
    for selection in (Selection(ADA, ((3, 0.5),), ((1, 0.1),), 2), Selection(BO)):
        assert Selection.from_json(selection.to_json()) == selection
    error = PersonaError("prompt_too_long", "the description is too long")
    back = Selection.from_json(Selection(BO, error=error).to_json()).error
    assert (back.cause, str(back)) == (error.cause, str(error))
