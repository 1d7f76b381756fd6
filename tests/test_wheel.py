"""The wheel alone, in an environment of its own and an empty directory. `make wheel` runs it."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`persona-pruner` of the wheel; its dependencies are those of this environment."""
    built, environment = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("environment")
    build = ["wheel", "--quiet", "--no-deps", "--wheel-dir", str(built), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    venv.create(environment, with_pip=True)
    site = next(environment.glob("lib/python3*/site-packages"))
    # Packages of a directory that a .pth file names are seen; its own .pth files, and with them this checkout, are not.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    wheel = next(built.glob("*.whl"))
    subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    return environment / "bin" / "persona-pruner"


def run(command, directory, *words):
    done = subprocess.run([command, *map(str, words)], cwd=directory, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packaged_example_is_ready_in_an_empty_directory(command, tmp_path):
    assert "--config run.yaml" in run(command, tmp_path, "init")
    told = run(command, tmp_path, "plan", "personas.jsonl", "--config", "run.yaml", "--output", "out")
    assert "to synthesize: 24" in told
    assert not (tmp_path / "out").exists()
