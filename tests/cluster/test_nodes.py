"""The main job on real Ray nodes that come and go, on shard groups of two, and on a disk that fills up."""

import os
import signal
import socket
import subprocess
import time

import cluster_runs as runs
import pytest
from ray_nodes import AUTOSCALED_PORT, Nodes, kill_raylet

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(900)]


def groups_up(output):
    file = output / "progress" / "status.json"
    return runs.status(output)["groups"]["up"] if file.exists() else 0


def test_node_killed_with_its_group_and_another_that_comes_later(undisturbed, tmp_path, cost):
    output = runs.with_data_of(undisturbed, tmp_path / "out")
    with Nodes(head_cpus=0) as nodes:
        first = nodes.add()
        with cost("SIGKILL of a raylet with its group, another node comes"):
            job = nodes.job(output)
            runs.wait_for(lambda: runs.checkpoints(output))
            kill_raylet(first)
            nodes.add()
            text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    assert "is tried again" in text
    assert runs.masks(output) == runs.masks(undisturbed)
    assert runs.checkpoints(output) == []


def test_node_added_is_used_and_its_going_does_not_end_the_run(undisturbed, tmp_path):
    output = runs.with_data_of(undisturbed, tmp_path / "out")
    # Steps enough for the second node's group to come while personas wait.
    settings = ("learning.steps=400", "groups.max=2", "groups.num_cpus=1")
    with Nodes(head_cpus=1) as nodes:
        job = nodes.job(output, *settings)
        runs.wait_for(lambda: runs.checkpoints(output))
        assert groups_up(output) <= 1
        second = nodes.add()
        runs.wait_for(lambda: groups_up(output) == 2)
        runs.wait_for(lambda: len(runs.checkpoints(output)) == 2)
        kill_raylet(second)
        text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    assert len(runs.masks(output)) == 3


def test_persona_of_a_drained_node_goes_on_elsewhere_with_the_same_mask(undisturbed, tmp_path, cost):
    """As a pod ends: it is drained, has its time, and is killed."""
    settings = ("learning.steps=150",)
    calm, output = (runs.with_data_of(undisturbed, tmp_path / name) for name in ("calm", "out"))
    began = time.monotonic()
    code, text = runs.run(calm, *settings, personas=1)
    calm_seconds = time.monotonic() - began
    assert code == 0, text
    with Nodes(head_cpus=0) as nodes:
        head = nodes.ids()
        first = nodes.add()
        (first_id,) = runs.wait_for(lambda: nodes.ids() - head)
        with cost("A node drained, then killed, another node there", calm=calm_seconds):
            job = nodes.job(output, *settings, personas=1)
            runs.wait_for(lambda: runs.checkpoints(output))
            nodes.add()
            nodes.drain(first_id, seconds=3)
            time.sleep(3)
            kill_raylet(first)
            text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    assert "is tried again" in text
    assert runs.masks(output) == runs.masks(calm)
    assert runs.checkpoints(output) == []


def test_waiting_personas_make_the_autoscaler_add_nodes_and_idle_nodes_go(undisturbed, tmp_path):
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", AUTOSCALED_PORT)) == 0:
            pytest.skip(f"another Ray listens at port {AUTOSCALED_PORT}, the only one that Ray's fake provider knows")
    output = runs.with_data_of(undisturbed, tmp_path / "out")
    with Nodes(head_cpus=0, autoscaled=2) as nodes:
        assert len(nodes.ids()) == 1
        job = nodes.job(output, "groups.max=3", "groups.num_cpus=1", "learning.steps=120")
        runs.wait_for(lambda: groups_up(output) == 2)
        assert len(nodes.ids()) == 3
        text, _ = job.communicate(timeout=600)
        assert job.returncode == 0, text
        assert len(runs.masks(output)) == 3
        runs.wait_for(lambda: len(nodes.ids()) == 1)


def test_one_shard_of_two_killed(undisturbed, tmp_path, cost):
    settings = ("groups.shards=2", "groups.max=1", "groups.num_cpus=0.5", "learning.steps=12")
    calm, output = (runs.with_data_of(undisturbed, tmp_path / name) for name in ("calm", "out"))
    began = time.monotonic()
    code, text = runs.run(calm, *settings, personas=1)
    calm_seconds = time.monotonic() - began
    assert code == 0, text
    with cost("SIGKILL of one shard of two", calm=calm_seconds):
        job = runs.start(output, *settings, personas=1)
        runs.wait_for(lambda: runs.checkpoints(output))
        shards = runs.pids_of(job, "ray::TrainingWorker")
        assert len(shards) == 2
        os.kill(shards[1], signal.SIGKILL)
        runs.wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in shards))
        text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    assert "group g1 was lost" in text
    assert "group g2 was lost" not in text
    assert runs.masks(output) == runs.masks(calm)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 2 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def test_full_disk_is_one_line_and_a_new_submission_goes_on_once_there_is_room(undisturbed, small_disk, cost):
    output = runs.with_data_of(undisturbed, small_disk / "out")
    with cost("Full disk, room made, submitted again"):
        job = runs.start(output, "scheduler.max_failures=0", "storage.deadline_seconds=3")
        runs.wait_for(lambda: runs.checkpoints(output))
        filler = small_disk / "filler"
        subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4096"], capture_output=True)
        text, _ = job.communicate(timeout=600)
        assert job.returncode == 4, text
        assert "No space left" in text
        assert "Traceback" not in text
        filler.unlink()
        code, text = runs.run(output)
    assert code == 0, text
    assert runs.masks(output) == runs.masks(undisturbed)
    assert runs.checkpoints(output) == []
