"""Judges over HTTP, through faults: every verdict comes, is stored, and is paid for once."""

import json
from collections import Counter

import http_faults as faults
import pytest
from evaluated_run import QUESTIONS, make_run
from judge_server import judge_server

from persona_pruner.config.evaluation import JudgeConfig
from persona_pruner.endpoint import EndpointError
from persona_pruner.evaluation.answers import store_rows
from persona_pruner.evaluation.judge import judged
from persona_pruner.evaluation.judging import judge_all
from persona_pruner.evaluation.summary import read_answers, stored_losses, summarize
from persona_pruner.storage import keys

PERSONAS = ["ann", "bo"]
INQUIRIES = 2 * 2 * (2 * 2 + 2)
"""Personas x questions x (2 arms x 2 aspects + one pair in both orders)."""


@pytest.fixture
def output(tmp_path):
    _, config, storage = make_run(tmp_path)
    for persona_id in PERSONAS:
        rows = [
            {"persona_id": persona_id, "arm": arm, "question": question, "number": number, "ended": True,
             "text": f"{persona_id} {arm}"}
            for arm in ("own", "global") for number, question in enumerate(QUESTIONS)
        ]  # fmt: skip
        store_rows(storage, "answers", persona_id, "d", rows)
    return config, storage


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judge_server() as running, faults.proxy(running.url) as proxy:
        running.proxy = proxy
        yield running


def run(output, server, **settings):
    config, storage = output
    judge = JudgeConfig(model="m", base_url=f"{server.proxy.url}/v1", pairs=("global",), **settings)
    evaluation = config.evaluation.model_copy(update={"judges": (judge,)})
    counted = []
    ended_by = judge_all(
        config.model_copy(update={"evaluation": evaluation}), storage, PERSONAS, lambda: False, counted.append
    )
    return ended_by, counted


def verdicts(storage):
    stored = {}
    for persona_id in PERSONAS:
        for item in storage.list(keys.judgements(persona_id)):
            stored |= json.loads(storage.get(item.key))
    return stored


def test_all_verdicts_come_through_faults_and_each_is_paid_for_once(output, server):
    server.proxy.plan(faults.RATE, faults.LOST, faults.CUT, times=6)
    assert run(output, server) == (None, [2])
    assert len(verdicts(output[1])) == INQUIRIES
    delivered = Counter(bytes(body) for body in server.proxy.delivered)
    assert sum(delivered.values()) == len(delivered) == INQUIRIES
    calls = server.proxy.requests
    assert run(output, server) == (None, [2])
    assert len(server.proxy.delivered) == INQUIRIES
    assert calls == server.proxy.requests
    costs = json.loads(output[1].get(keys.EVALUATION_COSTS))
    assert costs["rows"] == [["m", INQUIRIES, 10 * INQUIRIES, INQUIRIES]]


def test_what_came_back_as_nonsense_is_not_scored_and_asked_again_the_next_time(output, server):
    server.nonsense = 3 * INQUIRIES
    assert run(output, server) == (None, [2])
    assert verdicts(output[1]) == {}
    assert run(output, server) == (None, [2])
    assert len(verdicts(output[1])) == INQUIRIES


def test_a_budget_stops_cleanly_and_a_higher_one_goes_on_where_it_was(output, server):
    ended_by, _ = run(output, server, token_budget=60, concurrency=2)
    assert "token_budget is 60" in ended_by
    paid = len(server.asked)
    assert len(verdicts(output[1])) == paid < INQUIRIES
    assert run(output, server)[0] is None
    assert len(server.asked) == INQUIRIES
    assert json.loads(output[1].get(keys.EVALUATION_COSTS))["rows"] == [["m", INQUIRIES, 10 * INQUIRIES, INQUIRIES]]


def test_judges_reach_the_catalogs_columns(output, server):
    _, storage = output
    assert run(output, server)[0] is None
    answers = {table["persona_id"][0].as_py(): table for table in read_answers(storage)}
    rows = summarize(
        answers.values(), stored_losses(storage), ["judge>=0"], lambda name, table: judged(storage, name, table)
    ).to_pylist()
    for row in rows:
        expected = judged(storage, row["persona_id"], answers[row["persona_id"]])
        assert row["judge"] == pytest.approx(expected["own"]["judge_consistency"])
        assert 0 <= expected["global"]["preferred"] <= 1
        assert row["passes"] == 1


def test_an_endpoint_without_log_probabilities_is_told(output, server):
    server.logprobs = False
    with pytest.raises(EndpointError, match="judge m: the endpoint gives no log-probabilities"):
        run(output, server)
