"""Is everything that a job needs in place? One finding for each thing, with what to do where it is not."""

import contextlib
import os
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import StorageError
from persona_pruner.run.cluster_nodes import Finding, Node, ask_cluster, check_token, clock_skew
from persona_pruner.run.node_facts import node_facts, versions
from persona_pruner.storage.open import AT_START, open_storage

CLOCK_SECONDS = 5.0
"""A lease lives for 30 s; two clocks that differ by this much are no danger to it."""
LEAST_FREE = 0.06
"""Ray places nothing on a node whose disk is 95% full."""
LEAST_SHARED_MEMORY = 256 * 2**20


def diagnose(config: RunConfig | None, output: str | None, address: str | None) -> Iterator[Finding]:
    """Findings as they come. Without an address (and RAY_ADDRESS) only this machine is looked at."""
    address = address or os.environ.get("RAY_ADDRESS")
    backbone = config.backbone.model_dump() if config else None
    yield check_token()
    if address:
        finding, nodes = ask_cluster(address, backbone, output)
        yield finding
    else:
        yield Finding("ray", None, "no --address: only this machine is looked at")
        nodes = [Node("here", node_facts(backbone, output), 0.0)]
    if output:
        yield from _bucket(output)
    else:
        yield Finding("output", None, "no --output")
    for check in (_answers, _versions, _clocks, _gpus, _shared_memory, _compiler, _disk, _metrics):
        yield check(nodes)
    yield _backbone(nodes) if config else Finding("backbone", None, "no --config")
    if output:
        yield _output_of_nodes(nodes)


def _bucket(output: str) -> Iterator[Finding]:
    storage = open_storage(output, AT_START)
    key = f".doctor-{uuid.uuid4().hex}"
    try:
        storage.check_writable()
        began = time.time()
        storage.put(key, b"")
        ended = time.time()
        (stored,) = storage.list(key)
        storage.delete(key)
    except StorageError as error:
        yield Finding("output", False, str(error), "mend that; policies are in cluster/policies/")
        return
    yield Finding("output", True, f"{output} can be written, listed and cleaned")
    if storage.honours_conditions():
        yield Finding("create-if-absent", True, "of two writers one wins")
    else:
        remedy = "start one job at a time on this output, or use a server that knows If-None-Match"
        yield Finding("create-if-absent", False, f"{output}: the server ignores If-None-Match", remedy)
    yield _within(
        "clock of the output",
        {"it": clock_skew(began, stored.modified, ended)},
        "synchronise this machine's clock or the server's (NTP)",
    )


def _within(name: str, skews: Mapping[str, float], remedy: str) -> Finding:
    off = {place: skew for place, skew in skews.items() if abs(skew) > CLOCK_SECONDS}
    if off:
        return Finding(name, False, "; ".join(f"{place} is {skew:+.0f} s off" for place, skew in off.items()), remedy)
    return Finding(name, True, f"within {CLOCK_SECONDS:.0f} s")


def _each(name: str, nodes: Sequence[Node], fault: Callable[[Node], str | None], remedy: str, good: str) -> Finding:
    """Red with what `fault` says of each node that it complains about."""
    asked = [node for node in nodes if "fault" not in node.facts]
    faults = [f"{node.name}: {said}" for node in asked if (said := fault(node))]
    if faults:
        return Finding(name, False, "; ".join(faults), remedy)
    return Finding(name, True if asked else None, good if asked else "no node answered")


def _answers(nodes: Sequence[Node]) -> Finding:
    silent = [f"{node.name}: {node.facts['fault']}" for node in nodes if "fault" in node.facts]
    if silent:
        remedy = "look at that node's logs (/tmp/ray/session_latest/logs); is persona-pruner installed there?"
        return Finding("nodes", False, "; ".join(silent), remedy)
    return Finding("nodes", True if nodes else None, f"{len(nodes)} answer" if nodes else "none was asked")


def _versions(nodes: Sequence[Node]) -> Finding:
    here = versions()

    def fault(node: Node) -> str | None:
        other = [
            f"{name} {v} and not {here.get(name)}" for name, v in node.facts["versions"].items() if v != here[name]
        ]
        return ", ".join(other) or None

    good = ", ".join(f"{name} {version}" for name, version in here.items())
    return _each("versions", nodes, fault, "install the same image or constraints.txt on every node", good)


def _clocks(nodes: Sequence[Node]) -> Finding:
    skews = {node.name: node.skew for node in nodes if "fault" not in node.facts}
    return _within("clocks of the nodes", skews, "synchronise the clocks of these nodes (NTP)")


def _gpus(nodes: Sequence[Node]) -> Finding:
    def fault(node: Node) -> str | None:
        seen = node.facts["gpus"]
        return None if node.gpus in (None, seen) else f"Ray has {node.gpus:g}, torch sees {seen}"

    count = sum(node.facts.get("gpus", 0) for node in nodes)
    remedy = "start the node with --num-gpus as torch sees them; no GPU at all: a CUDA build of torch, the driver"
    return _each("gpus", nodes, fault, remedy, f"{count}, as Ray knows them")


def _shared_memory(nodes: Sequence[Node]) -> Finding:
    def fault(node: Node) -> str | None:
        total, needed = node.facts["shared_memory"], max(node.object_store, LEAST_SHARED_MEMORY)
        return (
            None
            if total >= needed
            else f"/dev/shm has {total / 2**20:.0f} MiB, Ray's object store {needed / 2**20:.0f}"
        )

    remedy = "give the container a larger /dev/shm (--shm-size, an emptyDir of medium Memory)"
    return _each("shared memory", nodes, fault, remedy, "holds the object store")


def _compiler(nodes: Sequence[Node]) -> Finding:
    def fault(node: Node) -> str | None:
        good = node.facts["operators"] or node.facts["compiler"] or node.facts["gpus"]
        return None if good else "neither a C++ compiler nor compiled operators of DeepSpeed"

    return _each("compiler", nodes, fault, "apt-get install g++, or use the image of cluster/Dockerfile", "there")


def _disk(nodes: Sequence[Node]) -> Finding:
    def fault(node: Node) -> str | None:
        full = [f"{path} has {disk['free'] / 2**30:.1f} GiB free of {disk['total'] / 2**30:.1f}"
                for path, disk in node.facts["disks"].items() if disk["free"] < LEAST_FREE * disk["total"]]  # fmt: skip
        return "; ".join(full) or None

    return _each("disk", nodes, fault, "clear it (old /tmp/ray/session_*), or give more; Ray stops at 95%", "has room")


def _metrics(nodes: Sequence[Node]) -> Finding:
    def fault(node: Node) -> str | None:
        if not node.metrics:
            return None
        with contextlib.suppress(OSError), urllib.request.urlopen(node.metrics, timeout=5):
            return None
        return f"{node.metrics} does not answer"

    remedy = "start the node with --metrics-export-port 9091 and open it to this machine"
    if all(not node.metrics for node in nodes):
        return Finding("metrics", None, "no cluster")
    return _each("metrics", nodes, fault, remedy, "every node's endpoint answers")


def _backbone(nodes: Sequence[Node]) -> Finding:
    marks = {m for node in nodes if (m := (node.facts.get("backbone") or {}).get("fingerprint"))}

    def fault(node: Node) -> str | None:
        backbone = node.facts["backbone"]
        if "fault" in backbone:
            return str(backbone["fault"])
        return f"fingerprint {backbone['fingerprint'][:12]}" if len(marks) > 1 else None

    remedy = "put the same weights where backbone.path leads on every node; an s3:// path is the same everywhere"
    return _each("backbone", nodes, fault, remedy, f"fingerprint {min(marks, default='')[:12]} everywhere")


def _output_of_nodes(nodes: Sequence[Node]) -> Finding:
    def fault(node: Node) -> str | None:
        return node.facts["output"].get("fault")

    remedy = "give every node the same credentials and endpoint (environment, role) and a way to the server"
    return _each("output from the nodes", nodes, fault, remedy, "every node can write it")
