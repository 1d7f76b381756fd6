"""Without a cluster: what is told when there is none. Runs on real ones are in tests/cluster."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ClusterError
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.run.ray_cluster import connect, ray_cluster


def test_a_cluster_that_does_not_answer_is_one_line_with_its_address(monkeypatch):
    import ray

    def refuse(**options):
        raise ConnectionError("Failed to connect to GCS\nwith a long explanation")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "init", refuse)
    progress = ProgressReporter(Console(file=io.StringIO()))
    with pytest.raises(ClusterError) as raised, ray_cluster(RunConfig(), progress):
        pass
    assert str(raised.value) == "10.0.0.1:6379: no Ray cluster answers: Failed to connect to GCS"


@pytest.mark.parametrize(("failures", "message"), [(2, ""), (3, "a local Ray could not be started: timed out 3")])
def test_a_local_ray_that_a_busy_machine_keeps_from_starting_is_started_again(monkeypatch, failures, message):
    import ray

    starts = []

    def init(**options):
        starts.append(options["address"])
        if len(starts) <= failures:
            raise RuntimeError(f"timed out {len(starts)}\nwith a long explanation")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError) if message else contextlib.nullcontext() as raised:
        connect(RunConfig())
    assert starts == ["local"] * 3
    assert not message or str(raised.value) == message


def test_a_touch_of_ray_without_a_cluster_starts_none():
    code = (
        "import persona_pruner.run.job, ray\n"
        "try:\n    ray.put(1)\n"
        "except Exception as error:\n    print(type(error).__name__, ray.is_initialized())\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_AUTO_CONNECT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.split()[-1] == "False", done.stderr
