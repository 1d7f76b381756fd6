"""Without a cluster: what is told when there is none. Runs on real ones are in tests/cluster."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ClusterError
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.run.ray_cluster import ray_cluster


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


def test_a_touch_of_ray_without_a_cluster_starts_none():
    code = (
        "import persona_pruner.run.job, ray\n"
        "try:\n    ray.put(1)\n"
        "except Exception as error:\n    print(type(error).__name__, ray.is_initialized())\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_AUTO_CONNECT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout.split()[-1] == "False", done.stderr
