"""Actors of one placement group that form one DeepSpeed world: how they are requested, started and stopped."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from persona_pruner.config.schema import ActorsConfig, GroupsConfig


def request_placement_group(settings: ActorsConfig | GroupsConfig) -> PlacementGroup:
    """Ask for the resources of a group of `settings.shards` actors, on as few nodes as possible."""
    bundle = {"CPU": settings.num_cpus} | ({"GPU": settings.num_gpus} if settings.num_gpus else {})
    return placement_group([bundle] * settings.shards, strategy="PACK")


def start_workers(
    remote: Any, placement: PlacementGroup, settings: ActorsConfig | GroupsConfig, *arguments: Any
) -> tuple[list[Any], list[Any]]:
    """The actors of a group, by rank, and what they answer once their world has formed.

    `remote` has `address()`, asked of rank 0, and `start(rank, size, address)`.
    """
    actors = [
        remote.options(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(placement, index),
        ).remote(*arguments)
        for index in range(settings.shards)
    ]
    address = actors[0].address.remote()
    return actors, [actor.start.remote(rank, settings.shards, address) for rank, actor in enumerate(actors)]


def stop_workers(actors: Sequence[Any], placement: PlacementGroup) -> None:
    """Actors first: calls to actors of a removed placement group hang."""
    for actor in actors:
        ray.kill(actor)
    remove_placement_group(placement)
