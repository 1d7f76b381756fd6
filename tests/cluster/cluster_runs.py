"""Runs of the main job for tests: on the shipped example, made small enough to repeat under every fault."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "manifests" / "quickstart"
SMALL = [
    "synthesis.max_questions=60", "synthesis.select.k=24", "synthesis.rewrite.max_new_tokens=40",
    "synthesis.rewrite.samples_per_question=1", "synthesis.references.count=2", "synthesis.tile_personas=2",
    "synthesis.filter.min_answers=4", "learning.steps=24", "learning.rows_per_step=4", "learning.evaluate_every=6",
    "scheduler.checkpoint_steps=2", "scheduler.backoff_seconds=0.2", "scheduler.lease_seconds=5",
    "evaluation.enabled=false",
]  # fmt: skip


def command(output, *overrides, personas=3, manifest="manifests/quickstart/personas.jsonl", arguments=()):
    """The words of a job as a user writes them, below the repository."""
    words = [word for setting in (*SMALL, *overrides) for word in ("--set", setting)]
    limit = ["--limit", str(personas)] if personas else []
    config = "manifests/quickstart/run.yaml"
    return [
        "jobs/prune_personas.py",
        str(manifest),
        "--config",
        config,
        "--output",
        str(output),
        *limit,
        *arguments,
        *words,
    ]


def start(output, *overrides, env=None, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command(output, *overrides, **options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(output, *overrides, **options) -> tuple[int, str]:
    process = start(output, *overrides, **options)
    text, _ = process.communicate(timeout=600)
    return process.returncode, text


def masks(output: Path) -> dict[str, str]:
    """sha256 of every committed mask object, by persona."""
    return {
        file.parent.name: sha256(file.read_bytes()).hexdigest()
        for file in Path(output).glob("masks/*/*/mask.safetensors")
    }


def data(output: Path) -> dict[str, str]:
    return {
        file.parent.name: sha256(file.read_bytes()).hexdigest()
        for file in Path(output).glob("synthesis/personas/*/data.parquet")
    }


def rows(output: Path) -> list[dict]:
    """All synthesized data of an output."""
    files = sorted(Path(output).glob("synthesis/personas/*/data.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def with_data_of(undisturbed, to: Path) -> Path:
    """An output whose synthesis is done."""
    shutil.copytree(undisturbed / "synthesis", to / "synthesis")
    return to


def wait_for(what, seconds=300):
    """What `what` gives once it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"did not come within {seconds} s")


def children(pid: int) -> list[int]:
    """Every process below `pid`."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        below = [child for child, parent in parents.items() if parent == current]
        found += below
        todo += below
    return found


def pids_of(process: subprocess.Popen, name: str) -> list[int]:
    """Processes of a job whose title holds `name` (Ray names its workers after their actors)."""
    found = []
    for pid in children(process.pid):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if name in title:
            found.append(pid)
    return found


def checkpoints(output: Path) -> list[Path]:
    return list(Path(output).glob("checkpoints/*.safetensors"))


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL of a driver and everything that it has started, as when a machine goes."""
    for pid in [process.pid, *children(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def status(output: Path) -> dict:
    return json.loads((Path(output) / "progress" / "status.json").read_text())
