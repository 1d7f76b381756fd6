"""The wheel alone, in an environment of its own and an empty directory. `make wheel` runs it."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from ray_nodes import Head

ROOT = Path(__file__).parents[1]
SMALL = [
    "synthesis.max_questions=60", "synthesis.select.k=24", "synthesis.rewrite.max_new_tokens=40",
    "synthesis.rewrite.samples_per_question=1", "synthesis.references.count=2", "learning.steps=6",
    "synthesis.filter.min_answers=4",
]  # fmt: skip
RUN = ["personas.jsonl", "--config", "run.yaml", "--limit", "2", *(w for value in SMALL for w in ("--set", value))]

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`persona-pruner` of the wheel; its dependencies are those of this environment."""
    built, environment = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("environment")
    build = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    venv.create(environment, with_pip=True)
    site = next(environment.glob("lib/python3*/site-packages"))
    # Packages of a directory that a .pth file names are seen; its own .pth files, and with them this checkout, are not.
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    wheel = next(built.glob("*.whl"))
    subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    return environment / "bin" / "persona-pruner"


@pytest.fixture
def example(command, tmp_path):
    """An empty directory after `init`."""
    assert "--config run.yaml" in run(command, tmp_path, "init")
    return tmp_path


def run(command, directory, *words, env=None):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    done = subprocess.run(
        [command, *map(str, words)], cwd=directory, env=environment | {"OMP_NUM_THREADS": "1"} | (env or {}),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_packaged_example_is_ready_in_an_empty_directory(command, example):
    told = run(command, example, "plan", "personas.jsonl", "--config", "run.yaml", "--output", "out")
    assert "to synthesize: 24" in told
    assert not (example / "out").exists()


def test_run_list_compare_report_of_the_packaged_example(command, example):
    status = json.loads(run(command, example, "run", *RUN, "--output", "out", "--json"))
    assert (status["state"], status["masked"]) == ("done", 2)
    first, second = json.loads(run(command, example, "list", "out", "--json"))
    assert (first["state"], second["state"]) == ("masked", "masked")
    words = ("--backbone", "backbone", "--persona", first["persona_id"], "--question", "Who are you?", "--json")
    answers = json.loads(run(command, example, "compare", "out", *words))
    assert list(answers["Who are you?"]) == ["unpruned", first["persona_id"], second["persona_id"]]
    page = Path(run(command, example, "report", "out").split()[-1])
    assert first["persona_id"] in page.read_text()


def test_submit_to_a_cluster_that_has_the_wheel_and_wants_a_token(command, example):
    # Ray's socket names must stay under 107 bytes, which pytest's own directories do not leave room for.
    directory = Path(f"/tmp/pp-{secrets.token_hex(3)}")
    directory.mkdir()
    head = Head(directory, bin=command.parent)
    try:
        words = ["submit", *RUN, "--output", example / "out", "--address", head.address]
        told = run(command, example, *words, env=head.env)
    finally:
        head.close()
        shutil.rmtree(directory, ignore_errors=True)
    assert "2 of 2 personas masked" in told
    assert run(command, example, "verify", example / "out").strip().endswith("2 masks, all verify")
