"""A backbone of the scoring pool, in one process or in several actors that hold a shard each.

All ranks of a world get the same calls in the same order; rank 0's result is the result.
"""

import logging
from collections.abc import Sequence
from typing import Any

import ray
import torch
from torch import Tensor

from persona_pruner import activity
from persona_pruner.backbone.load import Backbone, World, free_port, load_backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ClusterError, PersonaError, UserError
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.activity_channel import forward_activity
from persona_pruner.scheduling.actor_group import ActorGroup, GroupLostError, WorkerError
from persona_pruner.synthesis.rewrite.backbone import SelfRewriter
from persona_pruner.synthesis.rewrite.base import Answer, Request
from persona_pruner.synthesis.sensitivity import Sensitivity

MAX_LOST = 5
"""Groups that one call may lose before it counts as the cause."""
log = logging.getLogger(__name__)

Scores = list[tuple[Persona, Tensor | PersonaError]]


class ScoringWorker:
    """One rank: scores tiles of personas, and answers where the backbone is the voice (Rewriter)."""

    def __init__(self, config: RunConfig, questions: Sequence[str], references: Sequence[Persona]) -> None:
        self._config, self._questions, self._references = config, questions, references
        forward_activity()

    def address(self) -> str:
        """host:port at which rank 0 will listen."""
        return f"{ray.util.get_node_ip_address()}:{free_port('')}"

    def start(self, rank: int, size: int, address: str) -> None:
        """Load this rank's shard of the backbone."""
        activity.begin(activity.LOADING)
        torch.set_num_threads(self._config.synthesis.actors.cpu_threads)
        world = World(rank, size, address, self._config.groups.timeout_seconds)
        self.use(load_backbone(self._config.backbone, world))
        activity.begin("")

    def use(self, backbone: Backbone) -> None:
        """Score and answer with a backbone that is loaded."""
        self._sensitivity = Sensitivity(backbone, self._config, self._questions, self._references)
        self._rewriter = SelfRewriter(backbone, self._config)
        self.model = self._rewriter.model

    def fingerprint(self) -> str:
        """The name under which rows list the backbone as the model that answered."""
        return self.model

    def tile(self, personas: Sequence[Persona]) -> Scores:
        """As Sensitivity.tile."""
        return list(self._sensitivity.tile(personas))

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """As SelfRewriter.answers."""
        return self._rewriter.answers(requests)


class ScoringGroup:
    """Shards as actors of one placement group behind the interface of one worker. A group that loses an actor is
    replaced."""

    def __init__(self, config: RunConfig, questions: Sequence[str], references: Sequence[Persona]) -> None:
        self._config = config
        self._arguments = (config, questions, references)
        self._group: ActorGroup | None = None
        self.model: str = self._call("fingerprint")

    def tile(self, personas: Sequence[Persona]) -> Scores:
        return self._call("tile", personas)  # type: ignore[no-any-return]

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        return self._call("answers", requests)  # type: ignore[no-any-return]

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call all shards; every call can be repeated, since shards keep nothing but the backbone."""
        message = ""
        for _ in range(MAX_LOST + 1):
            try:
                if self._group is None:
                    remote = ray.remote(max_restarts=0)(ScoringWorker)  # type: ignore[call-overload]
                    self._group = ActorGroup(self._config.synthesis.actors, remote, self._arguments)
                    self._group.wait_until_ready(self._config.groups.timeout_seconds)
                return self._group.call_and_wait(method, *arguments)
            except (WorkerError, GroupLostError) as error:
                self._close()
                if isinstance(error, WorkerError) and isinstance(error.cause, UserError):
                    raise error.cause from None
                message = str(error)
                log.warning("a scoring group was lost and is replaced: %s", message)
        raise ClusterError(f"{MAX_LOST + 1} scoring groups were lost under the same call: {message}")

    def _close(self) -> None:
        if self._group is not None:
            self._group.stop()
        self._group = None


def open_backbone(
    config: RunConfig, questions: Sequence[str], references: Sequence[Persona]
) -> ScoringWorker | ScoringGroup:
    """The backbone of one worker of the pipeline, loaded. Raises UserError."""
    if config.synthesis.actors.shards > 1:
        return ScoringGroup(config, questions, references)
    worker = ScoringWorker(config, questions, references)
    worker.start(0, 1, "")
    return worker
