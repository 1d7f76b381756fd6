"""The Ray cluster of a job: the one that it was submitted to, or a local one for it alone."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tenacity import Retrying, stop_after_attempt

from persona_pruner.backbone.operator import compile_operator
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ClusterError
from persona_pruner.run.progress import ProgressReporter

LOCAL_STARTS = 3
"""Ray waits 30 s for a node, and a raylet less than that for its agents (Ray 2.60 has both in its code): too short on a
busy machine, where the next start finds their files in memory."""


@contextmanager
def ray_cluster(config: RunConfig, progress: ProgressReporter) -> Iterator[None]:
    """Connected to Ray inside the block; nothing touches it afterwards. Raises ClusterError."""
    import ray

    if not os.environ.get("RAY_ADDRESS"):
        compile_operator(progress.begin)
    if not ray.is_initialized():
        phase = "connecting to Ray" if os.environ.get("RAY_ADDRESS") else "starting Ray"
        progress.begin(phase)
        connect(config)
        progress.end(phase)
    try:
        from persona_pruner.scheduling.activity_channel import ActivityReader

        progress.attach_cluster(ActivityReader().read, lambda count: explain_waiting(config, count))
        yield
    finally:
        progress.detach_cluster()
        ray.shutdown()


def connect(config: RunConfig) -> None:
    """Raises ClusterError."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(**options)
            return
        # A cluster of one process has nobody to keep out, and should not leave a token file behind.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        _start_local(num_cpus=_local_cpus(config), include_dashboard=False, **options)
    except Exception as error:
        what = f"{address}: no Ray cluster answers" if address else "a local Ray could not be started"
        raise ClusterError(f"{what}: {str(error).strip().splitlines()[0][:200]}") from None


def _start_local(**options: Any) -> None:
    import ray

    starts = Retrying(stop=stop_after_attempt(LOCAL_STARTS), before_sleep=lambda _: ray.shutdown(), reraise=True)
    starts(ray.init, address="local", **options)


def _local_cpus(config: RunConfig) -> int:
    """CPUs that let the smallest pools start, also where the machine has fewer."""
    groups, actors = config.groups, config.synthesis.actors
    needed = groups.min * groups.shards * groups.num_cpus + 0.25
    needed += 0 if config.shared_pool else actors.min * actors.num_cpus
    return max(os.cpu_count() or 1, int(-(-needed // 1)))


def explain_waiting(config: RunConfig, count: int) -> str:
    """What so many groups wait for: `2 groups wait for GPU: 1 each; the cluster has 0 free of 4`."""
    import ray

    from persona_pruner.scheduling.actor_group import bundle_of

    name, amount = list(bundle_of(config.group_pool).items())[-1]  # GPU where they need one
    amount *= config.groups.shards
    free, total = (resources.get(name, 0) for resources in (ray.available_resources(), ray.cluster_resources()))
    groups = "1 group waits" if count == 1 else f"{count} groups wait"
    return f"{groups} for {name}: {amount:g} each; the cluster has {free:g} free of {total:g}"
