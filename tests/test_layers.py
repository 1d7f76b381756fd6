"""Dependencies point one way, the heavy libraries are imported in few places, and tests mirror the package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "persona_pruner"

# Lower numbers know nothing of higher ones.
LEVELS = {
    "errors": 0, "activity": 0, "endpoint": 1, "config": 1, "storage": 2, "manifest": 3, "dataset": 4, "masks": 4,
    "backbone": 5, "learning": 6, "evaluation": 7, "scheduling": 8, "serving": 8, "synthesis": 9, "run": 10, "cli": 11,
}  # fmt: skip
ALLOWED_BELOW = {("masks", "backbone")}
"""Lazy imports: Mask.apply hooks into a model."""
ONLY_IN = {
    "ray": (
        "scheduling/",
        "run/",
        "serving/",
        "synthesis/pipeline.py",
        "synthesis/scoring_worker.py",
        "synthesis/shared_worker.py",
    ),
    "deepspeed": ("backbone/load.py", "backbone/operator.py"),
    "boto3": ("storage/s3.py",),
    "botocore": ("storage/s3.py", "storage/s3_errors.py"),
}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str | None:
    words = module.split(".")
    return words[1] if words[0] == "persona_pruner" and len(words) > 1 and words[1] in LEVELS else None


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    used = {part for name in imports(file) if (part := part_of(name)) and part != own}
    wrong = {part for part in used if LEVELS[part] >= LEVELS[own] and (own, part) not in ALLOWED_BELOW}
    assert not wrong, f"{file.name} ({own}) must not import {wrong}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_heavy_libraries_stay_in_their_files(library):
    users = {
        file.relative_to(PACKAGE).as_posix()
        for file in FILES
        if any(name.split(".")[0] == library for name in imports(file))
    }
    assert users
    assert {user for user in users if not user.startswith(ONLY_IN[library])} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_module_has_its_mirror_test(file):
    if file.name in ("__init__.py", "__main__.py"):
        return
    mirror = ROOT / "tests" / file.relative_to(PACKAGE).with_name(f"test_{file.name}")
    assert mirror.is_file(), f"{file.relative_to(ROOT)} is tested in {mirror.relative_to(ROOT)}, which is missing"


def test_nothing_deserialises_code():
    for file in [*FILES, *(ROOT / "jobs").glob("*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not calls & {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"}, file
