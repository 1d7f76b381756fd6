"""The tuning after the mask, as a job."""

import json
import shutil
import subprocess
import sys
import time

import cluster_runs as runs
import pytest

SETTINGS = [word for setting in runs.SMALL for word in ("--set", setting)]


def start(output, *settings):
    words = [sys.executable, "jobs/recover.py", str(output), "--config", "manifests/quickstart/run.yaml", *SETTINGS]
    words += [word for setting in settings for word in ("--set", setting)]
    return subprocess.Popen(
        words, cwd=runs.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def results(output):
    return {
        file.stem: json.loads(file.read_text()) for file in sorted((output / "recovery" / "results").glob("*.json"))
    }


@pytest.mark.cluster
@pytest.mark.slow
def test_a_killed_recovery_goes_on_and_ends_in_the_same_bits(undisturbed, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for output in (whole, killed):
        shutil.copytree(undisturbed, output)
    job = start(whole, "recovery.steps=20")
    text, _ = job.communicate(timeout=400)
    assert job.returncode == 0, text
    assert "3 of 3 tuned" in text
    assert all(found["loss_after"] < found["loss_before"] for found in results(whole).values())

    job = start(killed, "recovery.steps=20", "recovery.checkpoint_steps=2")
    runs.wait_for(lambda: list((killed / "recovery" / "checkpoints").glob("*.safetensors")) or job.poll() is not None)
    runs.kill_tree(job)
    time.sleep(6)  # the dead job's lease (scheduler.lease_seconds) runs out
    job = start(killed, "recovery.steps=20", "recovery.checkpoint_steps=2")
    text, _ = job.communicate(timeout=400)
    assert job.returncode == 0, text
    assert results(killed) == results(whole)
