"""What a user can get wrong: one line a fault on stderr, its exit status, no traceback, nothing written."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from persona_pruner.errors import Faults, PersonaError

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "manifests" / "quickstart"
MASK = "no/mask.safetensors"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["validate", "no.jsonl"], 2, "no.jsonl: no such manifest"),
        (["validate", "."], 2, "Is a directory"),
        (
            ["plan", EXAMPLE / "personas.jsonl", "--config", "no.yaml", "--output", "out"],
            2,
            "no such configuration file",
        ),
        (["status", "out"], 4, "no run has worked here"),
        (["verify", "out"], 2, "holds no mask"),
        (["pull", "out", "--to", "to", "--all", "--persona", "a"], 2, "--persona ID"),
        (["export", MASK, "--backbone", EXAMPLE / "backbone", "--to", "to"], 4, MASK),
        (["inspect", "out", "--persona", "a"], 2, "synthesize first"),
        (["share", "s3:///x", "--persona", "a"], 4, "no bucket"),
        (["submit", "m", "--config", "c", "--output", "o", "--env", "NOT_SET_HERE"], 2, "NOT_SET_HERE"),
        (["submit", "m", "--config", "c", "--output", "o", "--address", "http://127.0.0.1:9"], 4, "no Ray job server"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_one_line_and_nothing_written(tmp_path, words, status, said):
    command = [sys.executable, "-c", "from persona_pruner.cli import main; main()", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == status, done.stderr
    (line,) = done.stderr.splitlines()
    assert said in line
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_job_tells_all_faults_of_its_manifest_and_starts_nothing(tmp_path):
    manifest = tmp_path / "p.jsonl"
    manifest.write_text('{"id": ".hidden", "description": "x"}\n{"id": "b"}\n{"id": "c", \n')
    words = [manifest, "--config", EXAMPLE / "run.yaml", "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "jobs/prune_personas.py", *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [f"{manifest}:{row}" for row in (1, 2, 3)]
    assert list(tmp_path.iterdir()) == [manifest]


def test_faults_keep_twenty_lines_and_the_count():
    assert str(Faults([f"{n}" for n in range(23)])).splitlines() == [*map(str, range(20)), "... and 3 more faults"]
    assert str(Faults(["a"])) == "a"


def test_cause_of_a_persona_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(PersonaError("no_data", "a: no usable answer")))
    assert (error.cause, str(error)) == ("no_data", "a: no usable answer")
