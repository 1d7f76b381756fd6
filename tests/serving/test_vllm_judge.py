"""A judge at a real vLLM server, whose replies have log-probabilities, through faults on the way to it."""

import contextlib
import json
import math
from pathlib import Path

import http_faults as faults
import pytest

pytest.importorskip("vllm", reason="vllm has an environment of its own: make test-serving")

from served_run import PERSONAS, make_run
from server_process import API_KEY, running_server

from persona_pruner.config.load import check_config
from persona_pruner.endpoint import Endpoint, EndpointError
from persona_pruner.evaluation.answers import store_rows
from persona_pruner.evaluation.judge import judged, stored_verdicts
from persona_pruner.evaluation.judging import judge_all
from persona_pruner.evaluation.summary import read_answers
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

ARMS = {"unpruned": "I keep the light.", "own": "Aye, the lamp burns 85 nights.", "global": "No."}
INQUIRIES = len(ARMS) * 2 * 2 + 2 * 2
"""Arms x aspects x questions, and one pair in both orders a question."""
SMOLLM2 = Path(__file__).parents[2] / "runs/backbones/SmolLM2-135M-Instruct"
ENGINE = ("--slots", "8", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager")
CACHE = ("--kv-cache-memory-bytes", "200000000")


@contextlib.contextmanager
def judge_of(run, directory):
    """A proxy in front of a run's backbone, which serves as its own judge."""
    with (
        running_server(run.output, run.backbone, "vllm", directory / "server.log", *ENGINE, *CACHE) as server,
        faults.proxy(server.url) as proxy,
    ):
        yield proxy


@pytest.fixture(scope="module")
def judge(run, tmp_path_factory):
    with judge_of(run, tmp_path_factory.mktemp("log")) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if not (SMOLLM2 / "model.safetensors").exists():
        pytest.skip(f"no {SMOLLM2}: python manifests/smollm2/get_backbone.py")
    directory = tmp_path_factory.mktemp("smollm2")
    run = make_run(directory / "run", SMOLLM2)
    run.commit(run.mask(PERSONAS[0]))
    with judge_of(run, directory) as proxy:
        yield proxy


def plain_score(top, aspect):
    """The paper's formula over (token, log-probability), written out again."""
    total = weighted = 0.0
    for token, logprob in top:
        if aspect == "preference":
            value = {"A": 100, "B": 0}.get(token.strip(" ()[].*\"'").upper())
        elif aspect == "digit":
            value = 100 * int(token) / 9 if token.strip().isdecimal() and int(token) <= 9 else None
        else:
            value = int(token) if token.strip().isdecimal() and int(token) <= 100 else None
        if value is not None:
            total += math.e**logprob
            weighted += math.e**logprob * value
    return weighted / total if total else None


def mass_of_digits(top):
    return sum(math.e**logprob for token, logprob in top if token.strip().isdecimal() and int(token) <= 9)


def answered(directory, run):
    """An output with answers of one persona under every arm."""
    storage, persona_id = open_storage(directory), PERSONAS[0]
    storage.put(keys.mask(persona_id), run.mask(persona_id).to_bytes())
    rows = [
        {"persona_id": persona_id, "arm": arm, "question": question, "number": number, "text": text}
        for number, question in enumerate(("Who are you?", "How old are you? Say a number."))
        for arm, text in ARMS.items()
    ]
    store_rows(storage, "answers", persona_id, "d", rows)
    return storage


def recorded(monkeypatch):
    """The alternatives of the first token of every reply, by what was asked."""
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    replies, ask = {}, Endpoint.ask

    async def recording(self, messages, **options):
        choice = await ask(self, messages, **options)
        replies[messages[0]["content"]] = [(top.token, top.logprob) for top in choice.logprobs.content[0].top_logprobs]
        return choice

    monkeypatch.setattr(Endpoint, "ask", recording)
    return replies


def test_scores_are_the_plain_arithmetic_on_the_servers_replies_and_each_is_paid_for_once(
    judge, run, tmp_path, monkeypatch
):
    storage, persona_id = answered(tmp_path, run), PERSONAS[0]
    replies = recorded(monkeypatch)
    settings = {"model": run.backbone.name, "base_url": f"{judge.url}/v1", "least_mass": 0, "pairs": ["global"]}
    config = check_config({"evaluation": {"judges": [settings]}})
    judge.plan(faults.RATE, faults.LOST, faults.CUT, faults.CLOSE, times=8, path="chat")
    assert judge_all(config, storage, [persona_id], lambda: False, lambda done: None) is None
    assert judge.seen == 8
    assert len(judge.delivered) == INQUIRIES

    verdicts = {}
    for item in storage.list(keys.judgements(persona_id)):
        verdicts |= json.loads(storage.get(item.key))
    assert len(verdicts) == len(replies) == INQUIRIES
    assert all(len(top) == 20 for top in replies.values())
    assert not any(token.strip().isdecimal() for top in replies.values() for token, _ in top)
    expected = sorted(
        (score is None, round(score or 0, 6))
        for text, top in replies.items()
        for score in [plain_score(top, "preference" if "Reply A:" in text else "consistency")]
    )
    unswapped = [
        one | {"score": 100 - one["score"]} if one["swapped"] and one["score"] is not None else one
        for one in verdicts.values()
    ]
    assert sorted((one["score"] is None, round(one["score"] or 0, 6)) for one in unswapped) == expected
    assert any(not unscored for unscored, _ in expected)

    assert judge_all(config, storage, [persona_id], lambda: False, lambda done: None) is None
    assert len(judge.delivered) == INQUIRIES
    (table,) = read_answers(storage)
    assert set(judged(storage, persona_id, table)) <= set(ARMS)
    ((name, requests, prompt, completion),) = json.loads(storage.get(keys.EVALUATION_COSTS))["rows"]
    assert (name, requests, completion) == (run.backbone.name, INQUIRIES, 2 * INQUIRIES)
    assert prompt > 50 * INQUIRIES


def test_a_real_chat_model_scores_on_a_scale_of_one_digit(smollm2, run, tmp_path, monkeypatch):
    """Its tokenizer writes numbers digit by digit."""
    storage, replies = answered(tmp_path, run), recorded(monkeypatch)
    digit = "{answer}\nHow good is this reply to the question: {question}? Answer with one digit from 0 to {scale}."
    settings = {"model": SMOLLM2.name, "base_url": f"{smollm2.url}/v1", "least_mass": 0.05}
    evaluation = {"judges": [settings | {"scale": 9}], "judge_prompts": {"consistency": digit, "coherence": digit}}
    config = check_config({"evaluation": evaluation})
    assert judge_all(config, storage, PERSONAS[:1], lambda: False, lambda done: None) is None
    scores = [verdict.score for verdict in stored_verdicts(storage, PERSONAS[0])]
    expected = [plain_score(top, "digit") for top in replies.values() if mass_of_digits(top) >= 0.05]
    assert sorted({round(score, 6) for score in scores if score is not None}) == sorted(round(e, 6) for e in expected)
    assert expected


def test_a_real_chat_model_that_writes_42_as_two_tokens_is_refused_on_a_scale_of_100(
    smollm2, run, tmp_path, monkeypatch
):
    storage = answered(tmp_path, run)
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    settings = {"model": SMOLLM2.name, "base_url": f"{smollm2.url}/v1", "aspects": ["coherence"]}
    prompts = {"coherence": "Write the number 42 and nothing else."}
    config = check_config({"evaluation": {"judges": [settings], "judge_prompts": prompts}})
    with pytest.raises(EndpointError, match="writes 42 as two tokens"):
        judge_all(config, storage, PERSONAS[:1], lambda: False, lambda done: None)
    assert stored_verdicts(storage, PERSONAS[0]) == []
