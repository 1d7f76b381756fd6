"""Many personas on a tiny backbone: share of time in which groups train, the driver's cost, and plain Ray Tune.

python tests/benchmarks/scheduler.py [--quick] [--personas 200 2000] [--tune 50]

The Tune side is what one would write first: one trial a persona, which loads its backbone, on as many CPUs.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

sys.path.append(str(Path(__file__).parents[1] / "learning"))

from tiny_models import save_tiny

from persona_pruner.dataset import SCHEMA
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

ROOT = Path(__file__).parents[2]
ROWS = 12
GROUPS = 2


def settings(backbone: Path, steps: int) -> dict[str, Any]:
    return {
        "backbone": {"path": str(backbone)},
        "prompt": {"system": "You are {persona}."},
        "learning": {"channel_multiple": 8, "rows_per_step": 8, "steps": steps, "evaluate_every": 10**6},
        "groups": {"min": GROUPS, "max": GROUPS, "num_cpus": 1.0},
    }


def prepare(directory: Path, count: int, config: dict[str, Any]) -> tuple[Path, Path, Path]:
    """(manifest, configuration, output) with every persona's data in the output."""
    directory.mkdir(parents=True)
    people = [Persona(f"p{n:05d}", f"person number {n}") for n in range(count)]
    storage = open_storage(directory / "out")
    for persona in people:
        rows = [
            {
                "question_id": f"{n:08x}", "question": f"What is {n}?", "original_answer": "", "score": 1.0,
                "answer": f"{n} is what {persona.id} says it is.", "backend": "self", "model": "tiny", "filter": "ok",
                "split": "heldout" if n < 2 else "train", "sample": 0,
            }
            for n in range(ROWS)
        ]  # fmt: skip
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA.with_metadata({"persona_sha256": persona.sha256})), stream)
        storage.put(keys.persona_data(persona.id), stream.getvalue())
    manifest, file = directory / "people.jsonl", directory / "run.yaml"
    manifest.write_text("".join(json.dumps({"id": p.id, "description": p.description}) + "\n" for p in people))
    file.write_text(yaml.safe_dump(config))
    return manifest, file, directory / "out"


def environment() -> dict[str, str]:
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    return env


def our_job(directory: Path, count: int, config: dict[str, Any]) -> dict[str, float]:
    """Figures of one run of the training job; the driver's CPU and memory are read from /proc while it runs."""
    manifest, file, output = prepare(directory, count, config)
    words = [sys.executable, "jobs/train_masks.py", manifest, "--config", file, "--output", output]
    began = time.monotonic()
    with (directory / "log").open("w") as log:
        job = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    megabytes = cpu = 0.0
    first = None
    while job.poll() is None:
        time.sleep(0.2)
        try:
            status = Path(f"/proc/{job.pid}/status").read_text().splitlines()
            cpu = cpu_seconds(job.pid)
        except (FileNotFoundError, ProcessLookupError):
            break
        megabytes = max([megabytes, *(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))])
        if first is None and next((output / "masks").glob("*/*/mask.safetensors"), None):
            first = time.monotonic() - began
    wall = time.monotonic() - began
    if job.wait():
        raise SystemExit((directory / "log").read_text())
    told = json.loads((output / keys.STATUS).read_text())
    assert told["jobs"]["TERMINATED"] == count
    return {
        "personas": count,
        "seconds": round(wall, 1),
        "seconds_to_first_mask": round(first or wall, 1),
        "share_training": told["utilization"],
        "driver_cpu_share": round(cpu / wall, 3),
        "driver_mb": round(megabytes),
        "personas_per_hour": round(count / wall * 3600),
    }


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def waiting_driver(directory: Path, config: dict[str, Any], seconds: float) -> float:
    """Share of a core that the driver uses while its groups train and nothing happens."""
    endless = config | {"learning": config["learning"] | {"steps": 10**6}}
    manifest, file, output = prepare(directory, GROUPS, endless)
    words = [sys.executable, "jobs/train_masks.py", manifest, "--config", file, "--output", output]
    with (directory / "log").open("w") as log:
        job = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    while not (output / "checkpoints").is_dir():
        if job.poll() is not None:
            raise SystemExit((directory / "log").read_text())
        time.sleep(0.5)
    before, began = cpu_seconds(job.pid), time.monotonic()
    time.sleep(seconds)
    share = (cpu_seconds(job.pid) - before) / (time.monotonic() - began)
    job.terminate()
    job.wait(60)
    return share


def plain_tune(directory: Path, count: int, config: dict[str, Any]) -> float:
    """Personas an hour of Ray Tune with one trial a persona, start of Ray included, as in `our_job`."""
    manifest, file, output = prepare(directory, count, config)
    words = [sys.executable, __file__, "--run-tune", str(manifest), str(file), str(output)]
    began = time.monotonic()
    subprocess.run(words, cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return count / (time.monotonic() - began) * 3600


def run_tune(manifest: str, file: str, output: str) -> None:
    import ray
    from ray import tune

    from persona_pruner.manifest import read_manifest

    ray.init(address="local", num_cpus=GROUPS, include_dashboard=False, log_to_driver=False)
    personas = {persona.id: persona for persona in read_manifest(manifest).personas}

    def trial(choice: dict[str, Any]) -> None:
        from persona_pruner.backbone.load import load_backbone
        from persona_pruner.config.load import load_config
        from persona_pruner.dataset import read_persona_data
        from persona_pruner.learning.callbacks import TrainingCallbacks
        from persona_pruner.learning.trainer import MaskTrainer
        from persona_pruner.scheduling.training_worker import commit_mask

        config, storage = load_config(file), open_storage(output)

        class Checkpoints(TrainingCallbacks):
            def write_checkpoint(self, persona_id: str, data: bytes) -> None:
                storage.put(keys.checkpoint(persona_id), data)

        trainer = MaskTrainer(load_backbone(config.backbone), config)
        (outcome,) = trainer.train(
            [read_persona_data(storage, personas[choice["persona"]])],
            run_id="tune",
            callbacks=Checkpoints(),
        )
        commit_mask(storage, outcome.mask)

    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"persona": tune.grid_search(list(personas))},
        run_config=tune.RunConfig(storage_path=f"{output}/tune", verbose=0),
    )
    if tuner.fit().num_errors:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--personas", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--tune", type=int, default=50, help="personas of the comparison with Tune")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--run-tune", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_tune:
        return run_tune(*options.run_tune)
    if options.quick:
        options.personas, options.tune = [20], 6
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = settings(save_tiny(directory / "tiny"), options.steps)
        runs = []
        for count in options.personas:
            runs.append(our_job(directory / f"ours-{count}", count, config))
            print(runs[-1], flush=True)
        idle = waiting_driver(directory / "idle", config, 5 if options.quick else 30)
        print(f"driver while its groups train: {idle:.1%} of a core", flush=True)
        ours = our_job(directory / "ours", options.tune, config)["personas_per_hour"]
        tune_rate = plain_tune(directory / "tune", options.tune, config)
    print(f"{options.tune} personas: {ours} an hour here, {tune_rate:.0f} with one Tune trial each", flush=True)
    summary = {name: runs[-1][name] for name in ("share_training", "driver_mb", "driver_cpu_share")}
    print(
        json.dumps(
            summary | {"idle_driver_cpu": round(idle, 4), "ratio_tune": round(ours / tune_rate, 2), "runs": runs}
        )
    )


if __name__ == "__main__":
    main()
