"""Seconds of the commands about an output with many masks: 100,000 in a directory, 20,000 on a real S3 server.

python tests/benchmarks/output_scale.py [--directory 100000] [--s3 20000] [--quick]

Small masks, made by the format's own writer, so that the number of objects and not their size is measured. Every
command runs as its user runs it, in a process of its own. The S3 server is SeaweedFS on this machine. Each persona has
an object of data as well. `catalog_again_s`: an update after 1% more masks; `new_reads` counts the masks that it read.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from persona_pruner.config.load import load_config
from persona_pruner.manifest import Persona, read_manifest
from persona_pruner.masks import catalog
from persona_pruner.masks.format import Mask, MaskMetadata
from persona_pruner.run.identity import Identity, identify
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.storage.open import open_storage

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "manifests" / "quickstart" / "run.yaml"
LAYERS, CHANNELS = 2, 64
KEEP_LI = torch.arange(CHANNELS).expand(LAYERS, -1) < CHANNELS // 2


def mask_bytes(identity: Identity, persona: Persona) -> bytes:
    metadata = MaskMetadata(
        persona_id=persona.id, persona_sha256=persona.sha256, backbone="benchmark",
        backbone_fingerprint=identity.fingerprint, layers=LAYERS, channels=CHANNELS, kept=(CHANNELS // 2,) * LAYERS,
        method="ste", ratio=0.5, seed=0, steps=20, run_id=identity.run_id,
    )  # fmt: skip
    return Mask(KEEP_LI, metadata).to_bytes()


def put_personas(storage: Storage, identity: Identity, personas: list[Persona]) -> None:
    """A mask, and a place in the listing of data, for each."""

    def put(persona: Persona) -> None:
        storage.put(keys.mask(persona.id), mask_bytes(identity, persona))
        storage.put(keys.persona_data(persona.id), b"data")

    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(personas), 2000):
            list(pool.map(put, personas[start : start + 2000]))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return round(time.perf_counter() - began, 2)


def command(name: str, *words: object) -> dict[str, float]:
    """Seconds of a persona-pruner command, and of processor time, which other work on the machine leaves alone."""
    line = [sys.executable, "-m", "persona_pruner", name, *map(str, words)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = seconds(lambda: subprocess.run(line, check=True, capture_output=True, text=True, cwd=ROOT))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {f"{name}_s": took, f"{name}_cpu_s": round(cpu, 2)}


def update_and_count(storage: Storage) -> tuple[float, int]:
    """Seconds of an update of the catalog, and the masks that it read."""
    read: list[str] = []
    get = storage.get

    def counted(key: str) -> bytes:
        if key.startswith(keys.MASKS):
            read.append(key)
        return get(key)

    storage.get = counted  # type: ignore[method-assign]
    took = seconds(lambda: catalog.update_catalog(storage))
    return took, len(read)


def measure(url: str, count: int, work: Path) -> dict[str, Any]:
    manifest = work / f"personas-{count}.jsonl"
    rows = ({"id": f"p{n:06d}", "description": f"The {n}th of many characters."} for n in range(count + count // 100))
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    storage = open_storage(url)
    personas = list(read_manifest(str(manifest)).personas)
    identity = identify(load_config(CONFIG), personas, storage)
    found: dict[str, Any] = {"masks": count}
    found["write_s"] = seconds(lambda: put_personas(storage, identity, personas[:count]))
    with ProgressReporter(Console(file=io.StringIO())) as progress:
        progress.attach(storage, identity.run_id)
    plan = ("plan", manifest, "--config", CONFIG, "--output", url, "--json")
    found |= {f"{name}_without_catalog": took for name, took in command(*plan).items()}
    found["catalog_s"], read = update_and_count(storage)
    assert read == count, read
    found |= command(*plan)
    put_personas(storage, identity, personas[count:])
    found["catalog_again_s"], found["new_reads"] = update_and_count(open_storage(url))
    for words in (
        ("status", url),
        ("list", url, "--json"),
        ("gc", url, "--json"),
        ("verify", url),
        ("pull", url, "--all", "--to", work / f"pulled-{count}"),
    ):
        found |= command(*words)
    return found


@contextlib.contextmanager
def s3_bucket() -> Iterator[str]:
    """A bucket of a server that ends with the block; the environment leads there."""
    sys.path.append(str(ROOT / "tests"))
    from s3_server import new_bucket, seaweedfs

    with seaweedfs() as settings:
        os.environ.update(settings)
        yield new_bucket(settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=int, default=100_000, help="masks there; 0 leaves it out")
    parser.add_argument("--s3", type=int, default=20_000, help="masks there; 0 leaves it out")
    parser.add_argument("--quick", action="store_true", help="300 each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if options.directory:
            count = 300 if options.quick else options.directory
            results["directory"] = measure(str(work / "out"), count, work)
            print(f"directory: {results['directory']}", flush=True)
        if options.s3:
            with s3_bucket() as bucket:
                results["s3"] = measure(f"s3://{bucket}/run", 300 if options.quick else options.s3, work)
            print(f"s3: {results['s3']}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
