"""Masks in object storage against the published int64 index files, in one run on one server.

    python tests/benchmarks/storage.py            # 5,000 masks of 28 x 8192 channels; --quick: 200
Writes, pulls and verifies them over 16 connections, rebuilds the catalog, and does the same with the index files.
Server: the one that AWS_ENDPOINT_URL names, else ../shared/s3/start-s3.sh. The index files go round in --slots keys, so
that 5,000 of them fit a server that keeps objects in memory; each is written and read all the same.
`pull_mb_N` is the peak resident memory (MB) of a process that pulls N masks, `pull_mb_1` that of one which pulls one.
"""

import argparse
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import torch

from persona_pruner import MaskStore
from persona_pruner.config.schema import StorageConfig
from persona_pruner.masks.catalog import update_catalog
from persona_pruner.masks.format import Mask, MaskMetadata
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.storage.open import open_storage

SHARED = Path(__file__).parents[3] / "shared" / "s3"
LAYERS, CHANNELS = 28, 8192
KEPT = 6144
"""Ratio 0.25: the index file has 1.3 MiB."""


def one_mask(number: int) -> Mask:
    """A random mask; both forms hold the same channels."""
    random_LI = torch.rand(LAYERS, CHANNELS, generator=torch.Generator().manual_seed(number))
    keep_LI = torch.zeros(LAYERS, CHANNELS, dtype=torch.bool).scatter_(1, random_LI.topk(KEPT).indices, True)
    metadata = MaskMetadata(
        persona_id=f"p{number:05d}", persona_sha256="0" * 64, backbone="benchmark", backbone_fingerprint="0" * 64,
        layers=LAYERS, channels=CHANNELS, kept=(KEPT,) * LAYERS, method="ste", ratio=0.25, seed=number,
        steps=60, unpruned_loss=2.0, masked_loss=2.1, data_sha256="0" * 64,
        versions={"torch": torch.__version__}, run_id="0" * 16,
    )  # fmt: skip
    return Mask(keep_LI, metadata)


def index_file(mask: Mask) -> bytes:
    stream = io.BytesIO()
    mask.save_keep_indices(stream)
    return stream.getvalue()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def each(connections: int, call: Callable[[int], object], numbers: range) -> None:
    with ThreadPoolExecutor(connections) as pool:
        for _ in pool.map(call, numbers):
            pass


def pull_child(url: str, count: int, connections: int) -> None:
    """Pull `count` masks in this process; prints seconds and the peak resident memory in MB."""
    store = MaskStore(url, StorageConfig(connections=connections))
    with tempfile.TemporaryDirectory() as to:
        took = seconds(lambda: deque(store.pull((f"p{n:05d}" for n in range(count)), Path(to)), 0))
        assert len(MaskStore(to).ids()) == count
    print(json.dumps([took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6]))


def pulled(url: str, count: int, connections: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", url, "--masks", str(count), "--connections", str(connections)]
    took, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return took, peak


def measure_masks(storage: Storage, count: int, connections: int) -> dict[str, float]:
    """Masks made beforehand in blocks, so that only storing them is timed."""
    write, size = 0.0, 0
    for block in range(0, count, 250):
        blobs = {n: one_mask(n).to_bytes() for n in range(block, min(block + 250, count))}
        size += sum(map(len, blobs.values()))

        def put(number: int, blobs: dict[int, bytes] = blobs) -> None:
            storage.put_if_absent(keys.mask(f"p{number:05d}"), blobs[number])

        write += seconds(lambda put=put, blobs=blobs: each(connections, put, range(min(blobs), max(blobs) + 1)))
    few = max(count // 10, 1)
    pulls = {number: pulled(storage.url, number, connections) for number in (1, few, count)}
    rebuild = seconds(lambda: update_catalog(storage, connections, fresh=True))
    found = {"bytes_a_mask": size / count, "write_s": write, "pull_s": pulls[count][0], "rebuild_s": rebuild}
    return found | {f"pull_mb_{number}": peak for number, (_, peak) in pulls.items()}


def measure_indices(storage: Storage, count: int, connections: int, slots: int) -> dict[str, float]:
    """Same number of index files, written and read in rounds of `slots`; read means loaded, as its reader does."""
    write = pull = 0.0
    blobs = [index_file(one_mask(n)) for n in range(min(slots, count))]
    for start in range(0, count, slots):
        numbers = range(min(slots, count - start))
        write += seconds(lambda numbers=numbers: each(connections, lambda n: storage.put(f"{n}.pt", blobs[n]), numbers))
        with tempfile.TemporaryDirectory() as to:

            def read(number: int, to: str = to) -> None:
                path = Path(to) / f"{number}.pt"
                path.write_bytes(storage.get(path.name))
                torch.load(path, weights_only=True)

            pull += seconds(lambda numbers=numbers, read=read: each(connections, read, numbers))
    return {"bytes_an_index": sum(map(len, blobs)) / len(blobs), "index_write_s": write, "index_pull_s": pull}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=5000)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--slots", type=int, default=250)
    parser.add_argument("--quick", action="store_true", help="200 masks")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        pull_child(options.child, options.masks, options.connections)
        return
    count = 200 if options.quick else options.masks
    directory = None
    if "AWS_ENDPOINT_URL" not in os.environ:
        directory = Path(tempfile.gettempdir()) / f"persona-pruner-bench-{uuid.uuid4().hex[:8]}"
        command = [SHARED / "start-s3.sh", "18480", directory]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        os.environ.update(line.split("=", 1) for line in lines if line.startswith("AWS_"))
    try:
        bucket = f"bench-{uuid.uuid4().hex[:8]}"
        boto3.client("s3").create_bucket(Bucket=bucket)
        config = StorageConfig(connections=options.connections)
        found: dict[str, float] = {"masks": count, "connections": options.connections}
        found |= measure_masks(open_storage(f"s3://{bucket}/run", config), count, options.connections)
        indices = open_storage(f"s3://{bucket}/indices", config)
        found |= measure_indices(indices, count, options.connections, options.slots)
    finally:
        if directory:
            subprocess.run([SHARED / "stop-s3.sh", directory], capture_output=True, check=False)
            shutil.rmtree(directory, ignore_errors=True)
    found = {name: round(value, 2) for name, value in found.items()}
    for name, value in found.items():
        print(f"{name:>26} {value:>12,}")
    size, write, pull = (
        found[index] / found[own]
        for own, index in (
            ("bytes_a_mask", "bytes_an_index"), ("write_s", "index_write_s"), ("pull_s", "index_pull_s"),
        )
    )  # fmt: skip
    print(f"masks against index files: {size:.0f}x smaller, written {write:.1f}x and pulled {pull:.1f}x as fast")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
