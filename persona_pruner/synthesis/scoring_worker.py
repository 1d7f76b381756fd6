"""A backbone of the scoring pool, in one process or in several actors that hold a shard each.

All ranks of a world are called alike and in the same order; rank 0's answer counts.
"""

import logging
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from torch import Tensor

from persona_pruner.backbone.load import World, free_port, load_backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import PersonaError, UserError
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.actor_group import request_placement_group, start_workers, stop_workers
from persona_pruner.synthesis.commit import Answer
from persona_pruner.synthesis.rewrite import SelfRewriter
from persona_pruner.synthesis.sensitivity import Sensitivity
from persona_pruner.synthesis.sources import Question

MAX_LOST = 5
"""Groups that may be lost over one call before the call is held to be the cause."""
log = logging.getLogger(__name__)

Scores = list[tuple[Persona, Tensor | PersonaError]]


class ScoringWorker:
    """One rank: scores tiles of personas, and answers where the backbone is the voice (Rewriter)."""

    def __init__(self, config: RunConfig, questions: Sequence[str], references: Sequence[Persona]) -> None:
        self._config, self._questions, self._references = config, questions, references

    def address(self) -> str:
        """host:port at which rank 0 will listen."""
        return f"{ray.util.get_node_ip_address()}:{free_port('')}"

    def start(self, rank: int, size: int, address: str) -> None:
        """Load this rank's part of the backbone."""
        torch.set_num_threads(self._config.synthesis.actors.cpu_threads)
        world = World(rank, size, address, self._config.groups.timeout_seconds)
        backbone = load_backbone(self._config.backbone, world)
        self._sensitivity = Sensitivity(backbone, self._config, self._questions, self._references)
        self._rewriter = SelfRewriter(backbone, self._config)
        self.model = self._rewriter.model

    def fingerprint(self) -> str:
        """What the backbone is called as the model that answers."""
        return self.model

    def tile(self, personas: Sequence[Persona]) -> Scores:
        """As Sensitivity.tile."""
        return list(self._sensitivity.tile(personas))

    def answers(self, persona: Persona, questions: Sequence[Question]) -> list[list[Answer]]:
        return self._rewriter.answers(persona, questions)


class ScoringGroup:
    """Shards as actors of one placement group, called as if they were one. A group that loses an actor is replaced."""

    def __init__(self, config: RunConfig, questions: Sequence[str], references: Sequence[Persona]) -> None:
        self._config = config
        self._arguments = (config, questions, references)
        self._actors: list[Any] = []
        self._placement: PlacementGroup | None = None
        self.model: str = self._call("fingerprint")

    def tile(self, personas: Sequence[Persona]) -> Scores:
        return self._call("tile", personas)  # type: ignore[no-any-return]

    def answers(self, persona: Persona, questions: Sequence[Question]) -> list[list[Answer]]:
        return self._call("answers", persona, questions)  # type: ignore[no-any-return]

    def _call(self, method: str, *arguments: Any) -> Any:
        """Every call can be repeated: shards keep nothing but the backbone."""
        for lost in range(MAX_LOST + 1):
            try:
                if not self._actors:
                    self._start()
                return ray.get([getattr(actor, method).remote(*arguments) for actor in self._actors])[0]
            except RayError as error:
                self._close()
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError):
                    raise cause from None
                if lost == MAX_LOST:
                    raise
                log.warning("a scoring group was lost and is replaced: %s", str(error).splitlines()[0])
        raise AssertionError("unreachable")

    def _start(self) -> None:
        """Wait for the resources, however long a cluster takes to grow, and load the backbone."""
        settings = self._config.synthesis.actors
        self._placement = request_placement_group(settings)
        ray.get(self._placement.ready())
        remote = ray.remote(max_restarts=0)(ScoringWorker)  # type: ignore[call-overload]
        self._actors, started = start_workers(remote, self._placement, settings, *self._arguments)
        ray.get(started, timeout=self._config.groups.timeout_seconds)

    def _close(self) -> None:
        if self._placement is not None:
            stop_workers(self._actors, self._placement)
        self._actors = []


def open_backbone(
    config: RunConfig, questions: Sequence[str], references: Sequence[Persona]
) -> ScoringWorker | ScoringGroup:
    """The backbone of one worker of the pipeline, loaded. Raises UserError."""
    if config.synthesis.actors.shards > 1:
        return ScoringGroup(config, questions, references)
    whole = ScoringWorker(config, questions, references)
    whole.start(0, 1, "")
    return whole
