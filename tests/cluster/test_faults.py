"""The main job on real Ray under faults: every run ends with every persona masked once, bit for bit as undisturbed."""

import os
import shutil
import signal

import cluster_runs as runs
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def assert_same(output, undisturbed):
    assert runs.masks(output) == runs.masks(undisturbed)
    assert runs.data(output) == runs.data(undisturbed)
    assert runs.checkpoints(output) == []


def test_second_submission_does_nothing_and_a_deleted_mask_is_made_again(undisturbed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*.safetensors")}
    code, text = runs.run(output)
    assert code == 0, text
    assert "nothing to do" in text
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*.safetensors")} == before
    gone, *kept = sorted(before)
    gone.unlink()
    code, text = runs.run(output)
    assert code == 0, text
    assert "2 masked already, 1 with data, 0 to synthesize" in text
    assert runs.masks(output) == runs.masks(undisturbed)
    assert {file: file.stat().st_mtime_ns for file in kept} == {file: before[file] for file in kept}


def test_training_actor_killed_in_mid_step(undisturbed, tmp_path, cost):
    output = runs.with_data_of(undisturbed, tmp_path / "out")
    with cost("SIGKILL of the training actors in mid-step"):
        job = runs.start(output)
        runs.wait_for(lambda: runs.checkpoints(output))
        victims = runs.wait_for(lambda: runs.pids_of(job, "TrainingWorker.train"))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    assert "is tried again" in text
    assert_same(output, undisturbed)


@pytest.mark.fault
def test_scoring_actor_killed_in_the_middle(undisturbed, tmp_path, cost):
    output = tmp_path / "out"
    with cost("SIGKILL of the scoring actors", whole=True):
        job = runs.start(output)
        runs.wait_for(lambda: runs.data(output))
        victims = runs.pids_of(job, "ray::MapWorker")
        assert victims
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    assert_same(output, undisturbed)


@pytest.mark.fault
def test_two_shards_that_score_and_answer_give_the_same_data_also_when_one_is_killed(undisturbed, tmp_path, cost):
    output = tmp_path / "out"
    with cost("SIGKILL of one shard of two that score", whole=True):
        job = runs.start(output, "synthesis.actors.shards=2", "synthesis.actors.num_cpus=0.5")
        runs.wait_for(lambda: runs.data(output))
        os.kill(runs.pids_of(job, "ray::ScoringWorker.")[1], signal.SIGKILL)
        text, _ = job.communicate(timeout=600)
    assert job.returncode == 0, text
    for one, two in zip(runs.rows(undisturbed), runs.rows(output), strict=True):
        scores = one.pop("score"), two.pop("score")
        assert scores[1] == pytest.approx(scores[0], abs=1e-5)
        assert one == two


@pytest.mark.fault
def test_driver_killed_then_stopped_by_sigterm_then_submitted_again(undisturbed, tmp_path, cost):
    output = tmp_path / "out"
    with cost("SIGKILL of the driver with its Ray, then SIGTERM", whole=True):
        job = runs.start(output)
        runs.wait_for(lambda: runs.data(output))
        runs.kill_tree(job)
        job = runs.start(output)
        runs.wait_for(lambda: runs.checkpoints(output))
        job.send_signal(signal.SIGTERM)
        text, _ = job.communicate(timeout=600)
        assert job.returncode == 75, text
        assert runs.status(output)["state"] == "stopped"
        assert not list(output.glob("lease/*"))
        code, text = runs.run(output)
    assert code == 0, text
    assert_same(output, undisturbed)


def test_second_job_on_one_output_is_told_who_works_there(undisturbed, tmp_path):
    output = runs.with_data_of(undisturbed, tmp_path / "out")
    job = runs.start(output)
    runs.wait_for(lambda: list(output.glob("lease/*.json")))
    code, text = runs.run(output)
    assert code == 4
    assert "another job works there since" in text
    assert f"pid {job.pid}" in text
    assert job.poll() is None
    runs.kill_tree(job)


@pytest.mark.fault
def test_poisoned_personas_end_in_errors_and_the_rest_end_well(undisturbed, tmp_path):
    import json

    import pyarrow.parquet as pq

    output = runs.with_data_of(undisturbed, tmp_path / "out")
    long, empty, fine = sorted((output / "synthesis" / "personas").iterdir())
    for directory, change in ((long, "x " * 100_000), (empty, None)):
        table = pq.read_table(directory / "data.parquet")
        rows = [row | {"answer": change, "filter": "ok" if change else "empty"} for row in table.to_pylist()]
        pq.write_table(table.from_pylist(rows, table.schema), directory / "data.parquet")
    code, text = runs.run(output)
    assert code == 3, text
    assert list(runs.masks(output)) == [fine.name]
    assert runs.masks(output)[fine.name] == runs.masks(undisturbed)[fine.name]
    causes = {file.stem: json.loads(file.read_text())["cause"] for file in output.glob("errors/*.json")}
    assert causes == {long.name: "row_too_long", empty.name: "empty"}
    assert f"failed {long.name}" in text
    assert f"failed {empty.name}" in text


def test_other_settings_on_the_same_output_are_refused_with_both_values(undisturbed):
    code, text = runs.run(undisturbed, "learning.ratio=0.25")
    assert code == 2
    assert "learning.ratio is 0.5 there and 0.25 here" in text
