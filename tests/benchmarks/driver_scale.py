"""What the driver costs per persona: the real scheduler, pool and progress reporter on simulated groups.

python tests/benchmarks/driver_scale.py [--quick]

Time is virtual, so that all time measured is the driver's own. Of all trainings 1% fail, 1% end in an error of the
workers and 1% in a lost group. `ratio_100k`: ms per persona at 100,000 personas and 1,000 groups, over that at 1,000
and 16.
"""

import argparse
import gc
import io
import json
import logging
import queue
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "scheduling"))

from rich.console import Console
from simulated_groups import World, flaky

from persona_pruner.config.schema import RunConfig
from persona_pruner.manifest import Persona
from persona_pruner.run.progress import TICK_SECONDS, ProgressReporter
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.scheduling.scheduler import Scheduler
from persona_pruner.storage.open import open_storage

SIZES = ((1_000, 16), (10_000, 16), (10_000, 256), (100_000, 16), (100_000, 1_000))


class Observer:
    """The progress reporter, whose thread is replaced by virtual time."""

    def __init__(self, progress: ProgressReporter) -> None:
        self._progress, self._next = progress, 0.0
        self.changed = progress.changed

    def turn(self, scheduler: Scheduler) -> None:
        self._progress.turn(scheduler)
        if self._progress.clock() >= self._next:
            self._next = self._progress.clock() + TICK_SECONDS
            self._progress.tick()


def measure(personas: int, groups: int, directory: Path, memory: bool) -> dict[str, Any]:
    world = World(train=flaky(seed=0, share=0.01))
    config = RunConfig.model_validate({"groups": {"min": groups, "max": groups}})
    storage = open_storage(directory / f"{personas}-{groups}-{memory}")
    progress = ProgressReporter(Console(file=io.StringIO(), width=120), clock=world.clock)
    progress.attach(storage, "benchmark")
    progress.train(personas, 0, 24)
    people = [Persona(f"p{n:06d}", f"The {n}th of many characters, who says little.") for n in range(personas)]
    arrivals: queue.Queue[PersonaJob | None] = queue.Queue()
    gc.collect()
    if memory:
        tracemalloc.start()
    for persona in people:
        arrivals.put(PersonaJob(persona))
    arrivals.put(None)
    pool = GroupPool(config.groups, world.launch, world.wait, world.answer, world.clock)
    scheduler = Scheduler(config, pool, storage, Observer(progress), world.clock)
    scheduler.expected = personas
    began = time.process_time()
    assert scheduler.run(arrivals, lambda: False)
    seconds = time.process_time() - began
    world.groups.clear()
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0] if memory else 0
    tracemalloc.stop()
    assert scheduler.states["TERMINATED"] + scheduler.states["ERROR"] == personas
    progress.close("done")
    result = {"personas": personas, "groups": groups, "groups_lost": scheduler.groups_lost}
    if memory:
        return result | {"bytes_per_persona": round(kept / personas)}
    return result | {"ms_per_persona": round(1000 * seconds / personas, 4), "retries": scheduler.retries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    sizes = ((200, 16), (2_000, 100)) if parser.parse_args().quick else SIZES
    logging.disable(logging.ERROR)  # thousands of lines about retries
    runs = []
    with tempfile.TemporaryDirectory() as name:
        for personas, groups in sizes:
            runs.append(measure(personas, groups, Path(name), memory=False))
            print(runs[-1], flush=True)
        memory = measure(*sizes[1], Path(name), memory=True)
        print(memory, flush=True)
    summary = {
        "ratio_100k": round(runs[-1]["ms_per_persona"] / runs[0]["ms_per_persona"], 2),
        "ms_per_persona_100k": runs[-1]["ms_per_persona"],
        "bytes_per_persona": memory["bytes_per_persona"],
    }
    print(json.dumps(summary | {"runs": runs}))


if __name__ == "__main__":
    main()
