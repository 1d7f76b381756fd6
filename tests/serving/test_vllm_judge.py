"""A judge at a real vLLM server, whose replies have log-probabilities, through faults on the way to it."""

import json
import math

import http_faults as faults
import pytest

pytest.importorskip("vllm", reason="vllm has an environment of its own: make test-serving")

from served_run import PERSONAS
from server_process import API_KEY, running_server

from persona_pruner.config.load import check_config
from persona_pruner.endpoint import Endpoint
from persona_pruner.evaluation.answers import store_rows
from persona_pruner.evaluation.judge import judged
from persona_pruner.evaluation.judging import judge_all
from persona_pruner.evaluation.summary import read_answers
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

ARMS = {"unpruned": "I keep the light.", "own": "Aye, the lamp burns 85 nights.", "global": "No."}
INQUIRIES = len(ARMS) * 2 * 2 + 2 * 2
"""Arms x aspects x questions, and one pair in both orders a question."""


@pytest.fixture(scope="module")
def judge(run, tmp_path_factory):
    """A proxy in front of the shipped backbone, which serves as its own judge."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    engine = [
        "--kv-cache-memory-bytes",
        "200000000",
        "--max-model-len",
        "512",
        "--max-num-seqs",
        "8",
        "--enforce-eager",
    ]
    with (
        running_server(run.output, run.backbone, "vllm", log, "--slots", "8", *engine) as server,
        faults.proxy(server.url) as proxy,
    ):
        yield proxy


def plain_score(top, aspect):
    """The paper's formula over (token, log-probability), written out again."""
    total = weighted = 0.0
    for token, logprob in top:
        if aspect == "preference":
            value = {"A": 100, "B": 0}.get(token.strip(" ()[].*\"'").upper())
        else:
            value = int(token) if token.strip().isdecimal() and int(token) <= 100 else None
        if value is not None:
            total += math.e**logprob
            weighted += math.e**logprob * value
    return weighted / total if total else None


def test_scores_are_the_plain_arithmetic_on_the_servers_replies_and_each_is_paid_for_once(
    judge, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    storage, persona_id = open_storage(tmp_path), PERSONAS[0]
    storage.put(keys.mask(persona_id), run.mask(persona_id).to_bytes())
    rows = [
        {"persona_id": persona_id, "arm": arm, "question": question, "number": number, "text": text}
        for number, question in enumerate(("Who are you?", "How old are you? Say a number."))
        for arm, text in ARMS.items()
    ]
    store_rows(storage, "answers", persona_id, "d", rows)
    settings = {"model": run.backbone.name, "base_url": f"{judge.url}/v1", "least_mass": 0, "pairs": ["global"]}
    config = check_config({"evaluation": {"judges": [settings]}})

    replies, ask = {}, Endpoint.ask

    async def recording(self, messages, **options):
        choice = await ask(self, messages, **options)
        replies[messages[0]["content"]] = [(top.token, top.logprob) for top in choice.logprobs.content[0].top_logprobs]
        return choice

    monkeypatch.setattr(Endpoint, "ask", recording)
    judge.plan(faults.RATE, faults.LOST, faults.CUT, faults.CLOSE, times=8, path="chat")
    assert judge_all(config, storage, [persona_id], lambda: False, lambda done: None) is None
    assert judge.seen == 8
    assert len(judge.delivered) == INQUIRIES

    verdicts = {}
    for item in storage.list(keys.judgements(persona_id)):
        verdicts |= json.loads(storage.get(item.key))
    assert len(verdicts) == len(replies) == INQUIRIES
    assert all(len(top) == 20 for top in replies.values())
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
    assert (name, requests, completion) == (run.backbone.name, INQUIRIES, INQUIRIES)
    assert prompt > 50 * INQUIRIES
