"""The openai backend against a real server (`transformers serve`), and against one that fails in every way."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import http_faults as faults
import pytest
from s3_server import free_port

from persona_pruner.config.load import check_config
from persona_pruner.endpoint import EndpointError
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.rewrite.base import Request
from persona_pruner.synthesis.rewrite.openai import OpenAiRewriter
from persona_pruner.synthesis.sources import Question, question_id

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
BACKBONE = Path(__file__).parents[3] / "manifests" / "quickstart" / "backbone"
PERSONAS = [Persona(f"p{n}", f"number {n}, a baker in a small town") for n in range(5)]
QUESTIONS = [Question(question_id(text), text, "Plain.") for text in (f"What about {n}?" for n in range(100))]
KEY = "sk-wrong-and-secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server that answers as the shipped backbone."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    words = [Path(sys.executable).parent / "transformers", "serve", BACKBONE, "--host", "127.0.0.1", "--port", port]
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(word) for word in (*words, "--device", "cpu")],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    else:
        process.kill()
        pytest.skip(f"transformers serve did not start: {log.read_text()[-300:]}")
    yield url
    process.kill()
    process.wait()


@pytest.fixture
def proxy(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with faults.proxy(server) as between:
        yield between


def rewriter(proxy, directory, **settings):
    values = {"backend": "openai", "model": str(BACKBONE), "base_url": f"{proxy.url}/v1", "max_new_tokens": 4}
    config = check_config({"backbone": {"path": "x"}, "synthesis": {"rewrite": values | settings}})
    return OpenAiRewriter(config, open_storage(directory))


def requests(persona, count=100):
    return [Request(persona, question, 0) for question in QUESTIONS[:count]]


@pytest.mark.slow
def test_500_answers_come_through_faults_and_each_is_paid_for_once(proxy, tmp_path):
    proxy.plan(*(faults.RATE, faults.LOST, faults.CUT) * 3, faults.HANG, share=0.3)

    def ask(persona):
        return rewriter(proxy, tmp_path, timeout_seconds=4, concurrency=4).answers(requests(persona))

    with ThreadPoolExecutor(len(PERSONAS)) as actors:
        answers = dict(zip((p.id for p in PERSONAS), actors.map(ask, PERSONAS), strict=True))
    assert proxy.seen > 150
    assert all(answer.text for row in answers.values() for answer in row)
    delivered = Counter(proxy.delivered)
    assert len(delivered) == 500
    assert set(delivered.values()) == {1}
    proxy.plan()
    proxy.delivered.clear()
    again = rewriter(proxy, tmp_path)
    assert {p.id: again.answers(requests(p)) for p in PERSONAS} == answers
    assert proxy.delivered == []


def test_wrong_key_and_unknown_model_are_one_line_at_once(proxy, tmp_path):
    proxy.plan(faults.DENY)
    with pytest.raises(EndpointError) as caught:
        rewriter(proxy, tmp_path, concurrency=1).answers(requests(PERSONAS[0]))
    assert "the key is refused; check OPENAI_API_KEY" in str(caught.value)
    assert proxy.requests <= 2
    proxy.plan()
    with pytest.raises(EndpointError) as other:
        rewriter(proxy, tmp_path, concurrency=1, model="nobody/knows-this").answers(requests(PERSONAS[0], 3))
    assert "model nobody/knows-this" in str(other.value)
    for error in (caught, other):
        assert "\n" not in str(error.value)
        assert KEY not in str(error.value)


def test_a_server_that_hangs_is_the_personas_error_after_the_deadline(proxy, tmp_path):
    proxy.plan(faults.HANG)
    with pytest.raises(PersonaError, match="no answer within 2 s") as caught:
        rewriter(proxy, tmp_path, timeout_seconds=1, deadline_seconds=2).answers(requests(PERSONAS[0], 2))
    assert caught.value.cause == "rewrite_deadline"


def test_the_budget_stops_cleanly_and_keeps_what_was_paid_for(proxy, tmp_path):
    backend = rewriter(proxy, tmp_path, token_budget=300, concurrency=1)
    with pytest.raises(PersonaError, match=r"synthesis.rewrite.token_budget is 300") as caught:
        backend.answers(requests(PERSONAS[0]))
    assert caught.value.cause == "token_budget"
    paid = len(proxy.delivered)
    assert 0 < paid < 100
    storage = open_storage(tmp_path)
    assert list(storage.list(keys.stored_answers("p0")))
    rewriter(proxy, tmp_path).answers(requests(PERSONAS[0]))
    assert len(proxy.delivered) == 100
    # What both processes have paid is told in the report.
    costs = [json.loads(storage.get(item.key))["costs"] for item in storage.list(keys.REWRITER_COSTS)]
    assert sum(asked for asked, _, _ in costs) == 100
