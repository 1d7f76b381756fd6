"""Tokens a second with 1, 4 and 16 personas in a step, at 2 and at 16 rows each, on 1 and on 2 shards.

python tests/benchmarks/residents.py [--quick] [--backbone ../shared/data/backbone]
"""

import argparse
import json
import multiprocessing
import socket
import statistics
from typing import Any

import torch

from persona_pruner.backbone.load import World, load_backbone
from persona_pruner.config.load import check_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.outcome import Progress
from persona_pruner.learning.trainer import MaskTrainer

TEXT = "we walk to the old town and talk about bread, boats, games and the weather of last week"
WORDS = TEXT.split()


def configuration(path: str, rows: int, steps: int) -> RunConfig:
    learning = {"rows_per_step": rows, "steps": steps, "evaluate_every": 10**6, "init": "zeros"}
    return check_config({"backbone": {"path": path}, "learning": learning})


def personas(count: int, rows: int) -> list[PersonaData]:
    made = []
    for number in range(count):
        text = [
            Row(f"What about {WORDS[(number + n) % len(WORDS)]}?", " ".join(WORDS[: 6 + (5 * n + number) % 12]))
            for n in range(rows)
        ]
        description = f"number {number}, who says: {' '.join(WORDS * 3)}"
        made.append(PersonaData(f"p{number}", description, tuple(text), (), f"sha{number}"))
    return made


class Record(TrainingCallbacks):
    """(tokens, seconds) after every step of every persona."""

    def __init__(self, steps: list[tuple[int, float]]) -> None:
        self.steps = steps

    def report(self, progress: Progress) -> None:
        self.steps.append((progress.tokens, progress.seconds))


def measure(path: str, world: World, cases: list[tuple[int, int]], steps: int) -> list[tuple[float, float]]:
    """Median and spread (largest over smallest) of tokens per second, for each (personas, rows)."""
    torch.set_num_threads(1)
    backbone = load_backbone(configuration(path, 2, 1).backbone, world)
    found = []
    for count, rows in cases:
        seen: list[tuple[int, float]] = []
        trainer = MaskTrainer(backbone, configuration(path, rows, steps))
        trainer.train(personas(count, rows), run_id="r", callbacks=Record(seen))
        rates = []
        for step in range(1, steps):
            now, before = (seen[s * count : (s + 1) * count] for s in (step, step - 1))
            tokens = sum(a[0] - b[0] for a, b in zip(now, before, strict=True))
            rates.append(tokens / sum(a[1] - b[1] for a, b in zip(now, before, strict=True)))
        found.append((statistics.median(rates), max(rates) / min(rates)) if rates else (0.0, 0.0))
    return found


def _rank(path: str, rank: int, size: int, port: int, cases: list[tuple[int, int]], steps: int, queue: Any) -> None:
    world = World(rank, size, f"127.0.0.1:{port}")
    seen = measure(path, world, cases, steps) if rank == 0 else _follow(path, world, cases, steps)
    if rank == 0:
        queue.put(seen)


def _follow(path: str, world: World, cases: list[tuple[int, int]], steps: int) -> None:
    torch.set_num_threads(1)
    backbone = load_backbone(configuration(path, 2, 1).backbone, world)
    for count, rows in cases:
        MaskTrainer(backbone, configuration(path, rows, steps)).train(personas(count, rows), run_id="r")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--backbone", default="../shared/data/backbone")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    cases = [(1, 2), (4, 2)] if options.quick else [(p, r) for r in (2, 16) for p in (1, 4, 16)]
    steps = 3 if options.quick else 6
    result = {}
    for size in options.shards:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        spawn = multiprocessing.get_context("spawn")
        queue = spawn.Queue()
        args = (cases, steps, queue)
        ranks = [spawn.Process(target=_rank, args=(options.backbone, r, size, port, *args)) for r in range(size)]
        for process in ranks:
            process.start()
        for (count, rows), (rate, spread) in zip(cases, queue.get(), strict=True):
            print(f"{size} shards, {rows:2} rows, {count:2} personas: {rate:7.0f} tokens/s (spread {spread:.2f})")
            result[f"{size} shards, {rows} rows, {count} personas"] = round(rate)
        for process in ranks:
            process.join(30)
            process.kill()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
