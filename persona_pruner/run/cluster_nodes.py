"""The nodes of a Ray cluster and what each of them says of itself; or in one finding why nobody can ask them."""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona_pruner.run.node_facts import clock, node_facts

NODE_SECONDS = 300.0
"""A node may first have to pull the backbone."""
NO_RAY = "start a node, or check --address; from outside of the cluster give its job server, http://HEAD:8265"


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool | None
    """None: could not be looked at."""
    detail: str
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Node:
    name: str
    facts: Mapping[str, Any]
    skew: float
    """Seconds that its clock is off ours, as far as can be told."""
    gpus: float | None = None
    """What Ray was told; None outside a cluster."""
    object_store: int = 0
    metrics: str = ""


def check_token() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if mode != "token":
        said = f"RAY_AUTH_MODE is {mode or 'not set'}"
        if mode == "disabled":
            return Finding("token", True, said)
        return Finding("token", False, said, "export RAY_AUTH_MODE=token (or disabled) in every shell")
    file = _token_file()
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("token", True, "in RAY_AUTH_TOKEN")
    if not file.is_file():
        return Finding(
            "token", False, f"{file} is missing", "copy it from the head, or `ray get-auth-token --generate`"
        )
    if file.stat().st_mode & 0o077:
        return Finding("token", False, f"{file} can be read by others", f"chmod 600 {file}")
    return Finding("token", True, str(file))


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _token_text() -> str:
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return ""
    file = _token_file()
    return os.environ.get("RAY_AUTH_TOKEN") or (file.read_text().strip() if file.is_file() else "")


def ask_cluster(address: str, backbone: Any, output: str | None) -> tuple[Finding, list[Node]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    fault = _connection_fault(address)
    if fault:
        return fault, []
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        return Finding("ray", False, f"{address}: {_line(error)}", NO_RAY), []
    placed = []
    for node in (node for node in ray.nodes() if node["Alive"]):
        affinity = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": affinity}
        on_node: Any = ray.remote(**options)
        ask_clock, ask_facts = on_node(clock), on_node(node_facts)
        placed.append((node, ask_clock, ask_facts.remote(backbone, output)))
    end = time.monotonic() + NODE_SECONDS
    nodes = [_node_of_cluster(node, read_clock, answer, end) for node, read_clock, answer in placed]
    return Finding("ray", True, f"{address}: Ray {ray.__version__}, {len(nodes)} nodes"), nodes


def _node_of_cluster(node: Mapping[str, Any], read_clock: Any, answer: Any, end: float) -> Node:
    import ray

    host = node["NodeManagerAddress"]
    name = f"{host}#{node['NodeID'][:6]}"
    try:
        facts = ray.get(answer, timeout=max(1.0, end - time.monotonic()))
        began = time.time()
        skew = clock_skew(began, ray.get(read_clock.remote(), timeout=30), time.time())
    except Exception as error:
        return Node(name, {"fault": _line(error)}, 0.0)
    return Node(
        name, facts, skew,
        gpus=node["Resources"].get("GPU", 0.0),
        object_store=int(node["Resources"].get("object_store_memory", 0)),
        metrics=f"http://{host}:{node['MetricsExportPort']}/metrics",
    )  # fmt: skip


def clock_skew(began: float, clock: float, ended: float) -> float:
    """Seconds by which a clock that was read between two readings of ours lies outside of them."""
    return min(0.0, clock - began) + max(0.0, clock - ended)


def _line(error: Exception) -> str:
    """The end of an error, where Ray says what it was."""
    return " ".join(str(error).split())[-200:]


def _connection_fault(address: str) -> Finding | None:
    """Why nobody can connect, found in seconds: ray.init tries for minutes and then does not know."""
    import grpc
    import ray
    from ray._private import services
    from ray.core.generated.gcs_service_pb2 import CheckAliveReply  # type: ignore[attr-defined]

    gcs_address = address
    if address == "auto":
        try:
            gcs_address = services.canonicalize_bootstrap_address(address) or ""
        except ConnectionError:
            gcs_address = ""
        if not gcs_address:
            return Finding("ray", False, f"{address}: no Ray runs on this machine", NO_RAY)
    metadata = [("authorization", f"Bearer {token}")] if (token := _token_text()) else []
    try:
        with grpc.insecure_channel(gcs_address) as channel:
            call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
            version = CheckAliveReply.FromString(call(b"", timeout=10, metadata=metadata)).ray_version
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            remedy = "export RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token"
            return Finding("ray", False, f"{gcs_address}: the cluster does not take this token", remedy)
        return Finding("ray", False, f"{gcs_address}: no Ray cluster answers ({error.code().name})", NO_RAY)
    if version != ray.__version__:
        remedy = "install the cluster's version here, or ours there"
        return Finding("ray", False, f"{gcs_address} runs Ray {version}, here is {ray.__version__}", remedy)
    return None
