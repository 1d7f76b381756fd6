"""One job from manifest to masks: how soon the first mask is there, how busy the groups are, what the driver holds.

python tests/benchmarks/end_to_end.py [--personas 200 2000] [--steps 12] [--quick]

The real job on a local Ray with one pool of two groups (`gpus: 0`), a 2-layer model with random weights and the shipped
tokenizer, each size in a process of its own. Training takes 12 steps a persona, as manifests/smollm2/run.yaml does on a
real model, not the default 100: with those 2,000 personas are half an hour of two cores, and the share of the time
before the first mask is so much smaller. Of the wall time of the whole job, what its process imports, Ray's start and
the report included: `first_mask`: the share that has passed when the first mask is committed; `busy`: the share for
which groups scored, answered or trained. `driver_growth`: peak memory of the driver's process, most personas over
fewest.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GROUPS = 2
STEPS = 12


def settings(directory: Path, steps: int = STEPS) -> dict[str, Any]:
    return {
        "gpus": 0,
        "backbone": {"path": str(directory / "model")},
        "synthesis": {
            "sources": [{"path": str(directory / "questions.jsonl")}],
            "select": {"k": 12},
            "rewrite": {"max_new_tokens": 8, "max_samples_per_question": 1},
            "filter": {"min_words": 1, "min_answers": 1},
            "tile_personas": 16,
        },
        "learning": {"steps": steps, "channel_multiple": 8},
        "groups": {"min": GROUPS, "max": GROUPS},
    }


def measure(count: int, directory: Path, steps: int) -> None:
    """Run the job; print one JSON line."""
    began, began_clock = time.monotonic(), time.time()
    from rich.console import Console

    from persona_pruner.config.load import check_config
    from persona_pruner.manifest import Manifest, read_manifest
    from persona_pruner.run.job import run_job
    from persona_pruner.run.progress import ProgressReporter
    from persona_pruner.run.start import JobRequest, check_and_plan

    manifest = read_manifest(str(directory / "personas.jsonl"))
    manifest = Manifest(manifest.source, manifest.personas[:count])
    output = directory / f"out{count}"
    request = JobRequest(config=check_config(settings(directory, steps)), manifest=manifest, output=str(output))
    with ProgressReporter(Console(file=(directory / f"log{count}").open("w"))) as progress:
        code = run_job(request, check_and_plan(request), progress)
    seconds = time.monotonic() - began
    assert code == 0, (directory / f"log{count}").read_text()[-2000:]
    masks = [file.stat().st_mtime - began_clock for file in output.glob("masks/*/*/mask.safetensors")]
    assert len(masks) == count
    assert progress.scheduler is not None
    found = {
        "seconds": seconds,
        "first_mask": min(masks) / seconds,
        "busy": progress.scheduler.busy_seconds / (GROUPS * seconds),
        "busy_while_up": progress.scheduler.busy_seconds / progress.scheduler.pool.up_seconds,
        "driver_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="20 and 40 personas")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.personas[0], options.measure, options.steps)
        return
    # Here, since they load torch: the process that is measured pays for that within its time, as a job does.
    from persona_text import SHARED, read_jsonl
    from synthesis_scale import save_model

    sizes = [20, 40] if options.quick else sorted(options.personas)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_model(directory / "model")
        lines = (SHARED / "personas_many.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (directory / "personas.jsonl").write_text("".join(lines[: max(sizes)]), encoding="utf-8")
        questions = [row for row in read_jsonl("alpaca.jsonl.gz") if not row["input"]][: options.questions]
        (directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        for size in sizes:
            words = [sys.executable, __file__, "--measure", str(directory), "--personas", str(size)]
            words += ["--steps", str(options.steps)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            results[size] = json.loads(done.stdout.splitlines()[-1])
            print(f"{size} personas: {results[size]}", flush=True)
    growth = results[sizes[-1]]["driver_mb"] / results[sizes[0]]["driver_mb"]
    print(json.dumps(results[sizes[-1]] | {"personas": sizes[-1], "driver_growth": round(growth, 3)}))


if __name__ == "__main__":
    main()
