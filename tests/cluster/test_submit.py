"""The same job through a started cluster with token authentication, and with an S3 output."""

import secrets
import subprocess
from hashlib import sha256
from pathlib import Path

import cluster_runs as runs
import pytest
from ray_nodes import BIN, Head
from s3_server import new_bucket

from persona_pruner import MaskStore

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def head():
    # Ray's socket names must stay under 107 bytes, which pytest's own directories do not leave room for.
    directory = Path(f"/tmp/pp-{secrets.token_hex(3)}")
    directory.mkdir()
    started = Head(directory)
    yield started
    started.close()


def submit(head, words, env=None):
    return subprocess.Popen(
        [BIN / "ray", "job", "submit", "--address", head.address, "--working-dir", ".", "--", "python", *words],
        cwd=runs.ROOT, env=head.env | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.fault
def test_submitted_job_with_s3_output_gives_the_same_masks_bit_for_bit(
    head, real_s3, undisturbed, tmp_path, monkeypatch
):
    for name, value in real_s3.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{new_bucket(real_s3)}/run"
    words = ["submit", three(tmp_path), "--config", "manifests/quickstart/run.yaml", "--output", url]
    words += [word for setting in runs.SMALL for word in ("--set", setting)]
    words += [word for name in real_s3 for word in ("--env", name)]
    done = subprocess.run(
        [BIN / "persona-pruner", *words, "--address", head.address],
        cwd=runs.ROOT, env=head.env | real_s3, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert real_s3["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    store = MaskStore(url)
    found = {persona: sha256(store.read(persona)[0]).hexdigest() for persona in store.ids()}
    assert found == runs.masks(undisturbed)
    assert store.verify() == 3


def three(directory):
    """The manifest of the first three personas of the example."""
    manifest = directory / "three.jsonl"
    manifest.write_text("".join(f"{line}\n" for line in (runs.EXAMPLE / "personas.jsonl").read_text().splitlines()[:3]))
    return str(manifest)


def test_submit_command_passes_the_exit_status_on(head, tmp_path):
    manifest = tmp_path / "bad.jsonl"
    manifest.write_text('{"id": "../x", "description": "x"}\n')
    words = ["submit", str(manifest), "--config", "manifests/quickstart/run.yaml", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [BIN / "persona-pruner", *words, "--address", head.address],
        cwd=runs.ROOT, env=head.env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{manifest}:1: id '../x' is not usable" in done.stdout


def test_submit_without_token_or_server_is_one_line(head, tmp_path):
    words = ["submit", "m.jsonl", "--config", "c.yaml", "--output", str(tmp_path)]
    for address, env, said in (
        (head.address, {"RAY_AUTH_MODE": "disabled"}, "wants a token"),
        ("http://127.0.0.1:9", {}, "no Ray job server answers"),
    ):
        done = subprocess.run(
            [BIN / "persona-pruner", *words, "--address", address],
            cwd=tmp_path, env=head.env | env, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 4
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.fault
def test_job_stop_checkpoints_and_a_new_submission_goes_on(head, undisturbed, tmp_path, cost):
    output = tmp_path / "out"
    words = ["submit", "--address", head.address, "--output", str(output), "--config", "manifests/quickstart/run.yaml"]
    settings = [word for setting in runs.SMALL for word in ("--set", setting)]
    with cost("ray job stop, then submitted again", whole=True):
        follower = subprocess.Popen(
            [BIN / "persona-pruner", *words, three(tmp_path), *settings],
            cwd=runs.ROOT, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        job = next(line.split()[-1] for line in follower.stdout if line.startswith("submitted as"))
        runs.wait_for(lambda: runs.checkpoints(output))
        subprocess.run([BIN / "ray", "job", "stop", "--address", head.address, job], env=head.env, check=True)
        text, _ = follower.communicate(timeout=600)
        assert "submit again to go on" in text
        again = submit(head, runs.command(output))
        text, _ = again.communicate(timeout=600)
    assert again.returncode == 0, text
    assert runs.masks(output) == runs.masks(undisturbed)
