"""Asking, filtering and asking again, with a rewriter that answers by rule."""

import pytest

from persona_pruner.config.load import check_config
from persona_pruner.dataset import read_persona_data, read_table
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.answering import SynthesisResult, answer_and_commit
from persona_pruner.synthesis.rewrite.base import Answer
from persona_pruner.synthesis.rewrite.original import OriginalAnswers
from persona_pruner.synthesis.selection import Selection
from persona_pruner.synthesis.sources import Question, question_id

TEXTS = [f"Question {n}?" for n in range(20)]
QUESTIONS = [Question(question_id(text), text, f"Plain answer {n}.") for n, text in enumerate(TEXTS)]
ADA, BO = Persona("ada", "Ada, a pilot"), Persona("bo", "Bo, a baker")


class ByRule:
    """Empty answers to every third question on the first two tries; who was asked what is kept in `calls`."""

    model = "rule"

    def __init__(self):
        self.calls = []

    def answers(self, requests):
        self.calls.append([(r.persona.id, QUESTIONS.index(r.question), r.sample) for r in requests])
        if any(r.persona.id == "broken" for r in requests):
            raise PersonaError("rewrite_deadline", "no answer within 2 s")
        return [self._one(QUESTIONS.index(r.question), r.sample) for r in requests]

    def _one(self, number, sample):
        return Answer("" if number % 3 == 0 and sample < 2 else f"Aye, {number} and {sample} by the tide", True)


def selection(persona, count=12):
    return Selection(persona, tuple((i, 1 - i / 100) for i in range(count)), ((19, 0.0),))


def run(tmp_path, selections, rewriter=None, rewrite=None, **synthesis):
    config = check_config({"synthesis": {"rewrite": rewrite or {}, "filter": {"min_answers": 4}, **synthesis}})
    rewriter = rewriter or ByRule()
    results = list(
        answer_and_commit(
            config, open_storage(tmp_path), rewriter, QUESTIONS, selections, lambda text: len(text.split())
        )
    )
    return {result.persona_id: result for result in results}, rewriter


def test_questions_without_a_usable_answer_are_asked_again_until_there_are_as_many_as_selected(tmp_path):
    results, rewriter = run(tmp_path, [selection(ADA)])
    assert [len(call) for call in rewriter.calls] == [12, 6, 4]
    assert {number for _, number, _ in rewriter.calls[2]} >= {0, 3, 6, 9}
    assert results["ada"].usable >= 12
    assert results["ada"].counts["empty"] > 4
    table = read_table(open_storage(tmp_path), "ada").to_pylist()
    assert sum(row["filter"] == "empty" for row in table) == results["ada"].counts["empty"]
    assert [row["filter"] for row in table][-1] == "not_selected"


def test_tries_end_at_the_limit(tmp_path):
    results, rewriter = run(tmp_path, [selection(ADA)], rewrite={"max_samples_per_question": 1})
    assert len(rewriter.calls) == 1
    assert results["ada"].usable == 8


def test_rows_are_topped_up_to_the_wanted_answer_tokens(tmp_path):
    results, _ = run(tmp_path, [selection(ADA)], answer_tokens=150, rewrite={"max_samples_per_question": 9})
    train = read_persona_data(open_storage(tmp_path), ADA).train
    assert 150 <= sum(len(row.answer.split()) for row in train) < 250
    assert results["ada"].usable < 12 * 9


def test_personas_together_get_what_they_get_alone(tmp_path):
    alone = [run(tmp_path / p.id, [selection(p)])[0][p.id] for p in (ADA, BO)]
    together, rewriter = run(tmp_path / "both", [selection(ADA), selection(BO)])
    assert [together["ada"], together["bo"]] == alone
    assert {who for who, _, _ in rewriter.calls[0]} == {"ada", "bo"}
    for persona in (ADA, BO):
        one, other = (read_persona_data(open_storage(tmp_path / where), persona) for where in (persona.id, "both"))
        assert one == other


def test_what_is_wrong_with_a_persona_is_its_result_and_stops_nobody(tmp_path):
    refused = Selection(BO, error=PersonaError("prompt_too_long", "too long"))
    results, _ = run(tmp_path, [refused, selection(ADA), Selection(Persona("cy", "Cy"))])
    assert results["bo"].error == ("prompt_too_long", "too long")
    assert results["cy"].error[0] == "few_answers"
    assert results["ada"].error is None
    broken, _ = run(tmp_path, [selection(Persona("broken", "Broken"))])
    assert broken["broken"].error == ("rewrite_deadline", "no answer within 2 s")


def test_original_answers_are_no_echo_of_themselves_and_are_asked_for_once(tmp_path):
    results, _ = run(tmp_path, [selection(ADA)], OriginalAnswers(), {"backend": "none"}, answer_tokens=10_000)
    assert results["ada"].counts == {"ok": 12}
    assert {row.answer for row in read_persona_data(open_storage(tmp_path), ADA).train} <= {q.answer for q in QUESTIONS}


@pytest.mark.parametrize("error", [None, ("storage", "no space")])
def test_a_result_travels_as_json(error):
    result = SynthesisResult("ada", error, {"ok": 3}, 3)
    assert SynthesisResult.from_json(result.to_json()) == result
