"""The main job with an S3 output: on a real server, through faults, and while the server is gone."""

import os
import signal
import time
from hashlib import sha256

import cluster_runs as runs
import http_faults
import pytest
from s3_server import PROCESSES, new_bucket

from persona_pruner import MaskStore
from persona_pruner.storage.open import open_storage

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.mark.fault
def test_a_third_of_all_s3_calls_failing_changes_nothing(real_s3, undisturbed, monkeypatch, cost):
    for name, value in real_s3.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{new_bucket(real_s3)}/run"
    with http_faults.proxy(real_s3["AWS_ENDPOINT_URL"]) as faults:
        faults.plan(http_faults.BUSY, http_faults.CUT, http_faults.LOST, share=0.3)
        with cost("30% of S3 calls refused, cut, or told to have failed", whole=True):
            code, text = runs.run(url, env={"AWS_ENDPOINT_URL": faults.url})
        assert code == 0, text
        assert faults.seen > 20
        assert real_s3["AWS_SECRET_ACCESS_KEY"] not in text
    store = MaskStore(url)
    found = {persona: sha256(store.read(persona)[0]).hexdigest() for persona in store.ids()}
    assert found == runs.masks(undisturbed)
    assert store.verify() == 3
    assert not list(store.storage.list("checkpoints/"))


@pytest.mark.fault
def test_server_that_is_gone_for_20_seconds_costs_nothing_but_time(real_s3, undisturbed, monkeypatch, cost):
    """The server's process is stopped (SIGSTOP) and continued, as in a long pause."""
    server = PROCESSES.get(real_s3["AWS_ENDPOINT_URL"])
    if server is None:
        pytest.skip("the S3 server is not a process of this machine")
    for name, value in real_s3.items():
        monkeypatch.setenv(name, value)
    bucket = new_bucket(real_s3)
    with cost("S3 server stopped for 20 s", whole=True):
        job = runs.start(f"s3://{bucket}/run")
        runs.wait_for(lambda: list(open_storage(f"s3://{bucket}/run").list("synthesis/")))
        os.kill(server, signal.SIGSTOP)
        time.sleep(20)
        os.kill(server, signal.SIGCONT)
        text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    store = MaskStore(f"s3://{bucket}/run")
    found = {persona: sha256(store.read(persona)[0]).hexdigest() for persona in store.ids()}
    assert found == runs.masks(undisturbed)
