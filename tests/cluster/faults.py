"""What each fault costs: seconds beyond a run that nothing disturbed, both from data that are there (`make faults`).

Every run must end with the same masks, bit for bit. Exit status 1 where one does not.
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import cluster_runs as runs
from ray_nodes import Nodes, kill_raylet
from rich.console import Console
from rich.table import Table

SHARDS = ("groups.shards=2", "groups.max=1", "groups.num_cpus=0.5")


def finish(job) -> None:
    text, _ = job.communicate(timeout=300)
    if job.returncode:
        raise SystemExit(f"the job ended with {job.returncode}:\n{text}")


def training(output: Path, *settings: str):
    """A job that has written its first checkpoint."""
    job = runs.start(output, *settings)
    runs.wait_for(lambda: runs.checkpoints(output))
    return job


def nothing(output: Path, *settings: str) -> None:
    finish(runs.start(output, *settings))


def actor(output: Path) -> None:
    job = training(output)
    for pid in runs.pids_of(job, "ShardActor.train"):
        os.kill(pid, signal.SIGKILL)
    finish(job)


def shard(output: Path) -> None:
    job = training(output, *SHARDS)
    os.kill(runs.pids_of(job, "ray::ShardActor")[-1], signal.SIGKILL)
    finish(job)


def node(output: Path) -> None:
    with Nodes(head_cpus=0) as nodes:
        first = nodes.add()
        job = nodes.job(output)
        runs.wait_for(lambda: runs.checkpoints(output))
        nodes.add()
        kill_raylet(first)
        finish(job)


def driver_twice(output: Path) -> None:
    for _ in range(2):
        runs.kill_tree(training(output))
    nothing(output)


def sigterm(output: Path) -> None:
    job = training(output)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    nothing(output)


FAULTS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "SIGKILL of the training actors": (actor, ()),
    "SIGKILL of one shard of two": (shard, SHARDS),
    "SIGKILL of a raylet, another node takes over": (node, ()),
    "SIGKILL of the driver, twice": (driver_twice, ()),
    "SIGTERM, then submitted again": (sigterm, ()),
}


def timed(data: Path, to: Path, run: Callable[..., None], *settings: str) -> tuple[float, dict[str, str]]:
    """(seconds, masks) of a run that finds its data there."""
    shutil.copytree(data / "synthesis", to / "synthesis")
    began = time.monotonic()
    run(to, *settings)
    return time.monotonic() - began, runs.masks(to)


def main() -> int:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    table = Table("fault", "seconds undisturbed", "seconds", "seconds lost", "masks", title="What faults cost")
    broken = False
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        nothing(data)
        calm: dict[tuple[str, ...], tuple[float, dict[str, str]]] = {}
        for number, (name, (fault, settings)) in enumerate(FAULTS.items()):
            if settings not in calm:
                calm[settings] = timed(data, Path(directory) / f"calm{number}", nothing, *settings)
            seconds, masks = timed(data, Path(directory) / f"fault{number}", fault)
            before, expected = calm[settings]
            same = masks == expected and len(masks) == 3
            broken |= not same
            table.add_row(
                name, f"{before:.0f}", f"{seconds:.0f}", f"{seconds - before:.0f}", "same" if same else "DIFFERENT"
            )
            print(f"{name}: {seconds - before:.0f} s lost", flush=True)
    Console(width=120).print(table)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
