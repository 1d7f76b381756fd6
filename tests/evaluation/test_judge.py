"""The arithmetic of judges against a plain re-implementation on recorded replies."""

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from judge_server import alternatives

from persona_pruner.config.evaluation import JudgeConfig, JudgePrompts
from persona_pruner.endpoint import EndpointError
from persona_pruner.evaluation.answers import SCHEMA
from persona_pruner.evaluation.judge import (
    expected_score,
    inquiries,
    judge_persona,
    judged,
    preference,
    stored_verdicts,
)
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

RECORDED_BY_VLLM = [json.loads(line) for line in (Path(__file__).parent / "judge_replies.jsonl").open()]
RECORDED = [
    [("85", -0.2), ("90", -2.0), ("Sure", -5.0)],
    [("Sure", -0.1), ("85", -3.0)],
    [(" 70", -1.0), ("70", -1.5), ("101", -0.9), ("-5", -3.0), ("1.5", -4.0)],
    [("eighty", -0.01)],
    [("0", math.log(0.25)), ("no", math.log(0.75))],
    *(alternatives(f"prompt {number}") for number in range(20)),
]


def plain_score(top, least_mass=0.25, scale=100):
    total = weighted = 0.0
    for token, logprob in top:
        try:
            value = int(token.strip())
        except ValueError:
            continue
        if 0 <= value <= scale:
            probability = math.e**logprob
            total += probability
            weighted += probability * value * 100 / scale
    return None if total < least_mass or total == 0 else weighted / total


@pytest.mark.parametrize("top", RECORDED, ids=str)
def test_a_score_is_the_expectation_over_number_tokens(top):
    assert expected_score(top, 0.25) == pytest.approx(plain_score(top))


@pytest.mark.parametrize("reply", RECORDED_BY_VLLM, ids=lambda reply: reply["aspect"])
def test_replies_recorded_from_a_vllm_server_give_what_the_formula_says(reply):
    """The shipped backbone, asked which reply is better, has letters and no number among its 20 likeliest tokens;
    SmolLM2, asked for a digit, has digits there."""
    top = reply["top"]
    probabilities = {token: math.exp(logprob) for token, logprob in top}
    assert len(probabilities) == 20
    if "scale" in reply:
        scores = [expected_score(top, least_mass, reply["scale"]) for least_mass in (0.005, 0.5)]
        assert scores == [pytest.approx(plain_score(top, 0.005, reply["scale"])), None]
        return
    assert expected_score(top, 0.0) is plain_score(top, 0.0) is None
    a, b = probabilities["A"], probabilities.get("B", 0.0)
    assert preference(top, 0.1) == pytest.approx(100 * a / (a + b))
    assert preference(top, 0.9) is None


def test_what_has_too_little_mass_on_numbers_is_unscored():
    assert expected_score([("85", math.log(0.24)), ("Sure", math.log(0.76))], 0.25) is None
    assert expected_score([("85", math.log(0.26)), ("Sure", math.log(0.74))], 0.25) == pytest.approx(85)
    assert expected_score([], 0.0) is None


def test_a_preference_is_the_share_of_a_among_both_letters():
    top = [("A", math.log(0.3)), (" a", math.log(0.15)), ("B", math.log(0.15)), ("Both", math.log(0.4))]
    assert preference(top, 0.25) == pytest.approx(75)
    assert preference([("A", math.log(0.2)), ("I", math.log(0.8))], 0.25) is None


def answers(own="Aye."):
    rows = [
        {"persona_id": "ada", "arm": arm, "question": "Why?", "number": 0, "text": text}
        for arm, text in (("unpruned", "Arr."), ("own", own), ("global", "No."))
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def test_every_answer_is_asked_about_and_pairs_in_both_orders():
    judge = JudgeConfig(model="m", pairs=("global",))
    asked = inquiries(answers(), "Ada {question}", judge, JudgePrompts(preference="{persona}: {a} or {b}?"))
    assert [(one.verdict.aspect, one.verdict.arm) for one in asked] == [
        *((aspect, arm) for arm in ("unpruned", "own", "global") for aspect in ("consistency", "coherence")),
        ("preference", "global"), ("preference", "global"),
    ]  # fmt: skip
    assert [one.messages[0]["content"] for one in asked[-2:]] == [
        "Ada {question}: Aye. or No.?", "Ada {question}: No. or Aye.?"
    ]  # fmt: skip
    assert "Character: Ada {question}" in asked[0].messages[0]["content"]
    assert len({one.name(judge) for one in asked}) == len(asked)


def test_of_conversations_only_the_named_turns_are_judged_and_answers_always():
    spoken = [row | {"turn": turn} for turn in (None, 1, 2, 3) for row in answers().to_pylist()]

    def asked_turns(**settings):
        judge = JudgeConfig(model="m", aspects=("coherence",), **settings)
        asked = inquiries(pa.Table.from_pylist(spoken, SCHEMA), "Ada", judge, JudgePrompts())
        return [one.verdict.turn for one in asked if one.verdict.arm == "own"]

    assert asked_turns() == [0, 1, 2, 3]
    assert asked_turns(turns=(1, 3)) == [0, 1, 3]


def test_verdicts_are_averaged_over_judges_and_those_of_older_answers_do_not_count(tmp_path):
    storage = open_storage(tmp_path)
    judges = [JudgeConfig(model=name, aspects=("consistency",), pairs=("global",)) for name in "mn"]
    stored = {}
    for judge, score, first, second in zip(judges, (80.0, 40.0), (90.0, 60.0), (70.0, 20.0), strict=True):
        for one in inquiries(answers(), "Ada", judge, JudgePrompts()):
            value = vars(one.verdict) | {"score": score}
            if one.verdict.aspect == "preference":
                value["score"] = second if one.verdict.swapped else first
            stored[one.name(judge)] = value
    storage.put(keys.judgements("ada", "0"), json.dumps(stored).encode())
    # One judge prefers the own answer in both orders, the other changes its mind with the order.
    assert judged(storage, "ada", answers()) == {
        "unpruned": {"judge_consistency": 60.0}, "own": {"judge_consistency": 60.0},
        "global": {"judge_consistency": 60.0, "preferred": 0.75},
    }  # fmt: skip
    assert judged(storage, "ada", answers(own="Nay.")) == {
        "unpruned": {"judge_consistency": 60.0}, "global": {"judge_consistency": 60.0}
    }  # fmt: skip


class Replying:
    """Stands in for an endpoint whose replies have these tokens, the first with these alternatives."""

    def __init__(self, *tokens, top):
        entries = [SimpleNamespace(token=token, top_logprobs=[]) for token in tokens]
        entries[0].top_logprobs = [SimpleNamespace(token=token, logprob=math.log(p)) for token, p in top.items()]
        self.choice = SimpleNamespace(logprobs=SimpleNamespace(content=entries))

    async def ask(self, messages, **options):
        self.asked = messages[0]["content"]
        return self.choice


def scored(endpoint, storage, **settings):
    judge = JudgeConfig(model="m", aspects=("coherence",), **settings)
    asked = inquiries(answers().slice(0, 1), "Ada", judge, JudgePrompts())
    asyncio.run(judge_persona(endpoint, judge, storage, "ada", asked))
    return [verdict.score for verdict in stored_verdicts(storage, "ada")]


def test_a_judge_whose_tokenizer_splits_numbers_is_refused_and_nothing_is_stored(tmp_path):
    """7 of 75 is no score."""
    storage = open_storage(tmp_path)
    with pytest.raises(EndpointError, match=r"judge m: its tokenizer writes 75 as two tokens.*set its scale to 9"):
        scored(Replying("7", "5", top={"7": 0.6, "8": 0.4}), storage)
    assert stored_verdicts(storage, "ada") == []


@pytest.mark.parametrize(
    ("tokens", "top", "score"),
    [
        (("75",), {"75": 0.5, "7": 0.5}, 41),
        (("7", "<|im_end|>"), {"7": 1.0}, 7),
        (("The", " score"), {"The": 0.4, "75": 0.3, "7": 0.3}, 41),
        # Whether these are first digits, nothing says.
        (("The", " score"), {"The": 0.4, "7": 0.3, "8": 0.3}, None),
    ],
)
def test_first_digits_are_not_taken_for_numbers(tmp_path, tokens, top, score):
    assert scored(Replying(*tokens, top=top), open_storage(tmp_path)) == [score and pytest.approx(score)]


def test_on_a_scale_of_one_digit_the_expectation_is_of_digits_and_figures_are_from_0_to_100(tmp_path):
    endpoint = Replying("The", top={"The": 0.4, "9": 0.3, "0": 0.1, "10": 0.2})
    assert scored(endpoint, open_storage(tmp_path), scale=9) == [pytest.approx(75)]
    assert "from 0 (noise) to 9 (clear" in endpoint.asked
    longer = Replying("1", "0", top={"1": 0.9, "9": 0.1})
    assert scored(longer, open_storage(tmp_path / "longer"), scale=9) == [None]


def test_asked_on_another_scale_the_newer_verdict_counts(tmp_path):
    storage = open_storage(tmp_path)
    assert scored(Replying("75", top={"75": 1.0}), storage) == [pytest.approx(75)]
    assert scored(Replying("9", top={"9": 1.0}), storage, scale=9) == [pytest.approx(100)]
