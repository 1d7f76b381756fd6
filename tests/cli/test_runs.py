import json
import subprocess
import sys

import pytest
from command_line import EXAMPLE, ROOT, run


def job(*words):
    command = [sys.executable, "jobs/prune_personas.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_validate_tells_and_counts():
    done = run("validate", EXAMPLE / "personas.jsonl")
    assert done.returncode == 0
    assert "24 personas, no faults" in done.stdout
    assert json.loads(run("validate", EXAMPLE / "personas.jsonl", "--json").stdout)["personas"] == 24


def test_faults_go_to_stderr_with_status_2(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"id": "../x", "description": "x"}\n{"id": "b"}\n')
    done = run("validate", tmp_path / "p.jsonl")
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [
        f"{tmp_path}/p.jsonl:1", f"{tmp_path}/p.jsonl:2"
    ]  # fmt: skip


def test_plan_counts_and_writes_nothing(tmp_path):
    words = ("plan", EXAMPLE / "personas.jsonl", "--config", EXAMPLE / "run.yaml", "--output", tmp_path / "out")
    found = json.loads(run(*words, "--json").stdout)
    assert (found["personas"], found["done"], found["to_synthesize"]) == (24, 0, 24)
    assert found["tokens"] > 0
    assert found["flop"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--set", "learning.ratio=half"], "learning.ratio = 'half'"),
        (["--set", "learning.ratoi=0.5"], "did you mean learning.ratio?"),
        (["--set", "backbone.path=/nowhere/model"], "/nowhere/model"),
        (["--set", "evaluation.conversations=/nowhere/talk.jsonl"], "/nowhere/talk.jsonl"),
        (["--set", "synthesis.sources=[{path: /nowhere/q.jsonl}]"], "/nowhere/q.jsonl"),
    ],
)
def test_job_with_bad_input_starts_and_writes_nothing(tmp_path, change, said):
    output = tmp_path / "out"
    done = job(EXAMPLE / "personas.jsonl", "--config", EXAMPLE / "run.yaml", "--output", output, *change)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    done = job(EXAMPLE / "personas.jsonl", "--config", EXAMPLE / "run.yaml", "--output", tmp_path / "file" / "out")
    assert done.returncode == 4
    assert "cannot be written" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_status_where_nothing_ran(tmp_path):
    done = run("status", tmp_path)
    assert done.returncode == 4
    assert "no run has worked here" in done.stderr


def test_list_of_nothing_says_so_and_makes_nothing(tmp_path):
    done = run("list", tmp_path / "out")
    assert done.returncode == 0
    assert "no persona" in done.stdout
    assert not (tmp_path / "out").exists()
