"""Shard groups: actors that hold the backbone together, and the pool of groups that grows and shrinks.

A group is one placement group with `groups.shards` actors, one DeepSpeed world. It loads the backbone once and keeps
it. The pool never blocks: everything that a group does is a Ray reference, and `poll` tells what has happened.
"""

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from persona_pruner import layout
from persona_pruner.backbone.load import World, load_backbone
from persona_pruner.config import RunConfig
from persona_pruner.errors import MaskError, PersonaError, StorageError, UserError
from persona_pruner.evaluation import table
from persona_pruner.learning.data import PersonaData
from persona_pruner.learning.global_mask import train_global
from persona_pruner.learning.outcome import Progress
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.manifest import Persona
from persona_pruner.mask import Mask, metadata_of
from persona_pruner.storage import NotFoundError, Storage, open_storage
from persona_pruner.synthesis.records import read_persona_data

QUEUE_DEPTH = 2
"""Calls that wait at a group, so that it is never idle between two personas."""
MAX_FAILED_STARTS = 3


@ray.remote(concurrency_groups={"control": 2}, max_restarts=0)
class ShardActor:
    """One shard of the backbone, and the work of its group. `control` methods answer while it trains."""

    def __init__(self, config: RunConfig, output: str, run_id: str) -> None:
        self.config, self.run_id = config, run_id
        self.storage = open_storage(output, config.storage)
        self._stop = threading.Event()
        self._progress: dict[str, Progress] = {}

    def address(self) -> str:
        """host:port at which rank 0 will listen."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def start(self, rank: int, size: int, address: str) -> dict[str, Any]:
        """Load this rank's shard. Returns pid, node, device and the share of parameters held here."""
        groups = self.config.groups
        torch.set_num_threads(groups.cpu_threads)
        self.backbone = load_backbone(self.config.backbone, World(rank, size, address, groups.timeout_seconds))
        self.trainer = MaskTrainer(self.backbone, self.config)
        return {"pid": os.getpid(), "node": socket.gethostname(), "device": str(self.backbone.device)}

    def train(self, personas: Sequence[Persona]) -> list[dict[str, Any]]:
        """Train personas together and commit their masks. One plain result for each, in order."""
        results: dict[str, dict[str, Any]] = {}
        data, restore = [], {}
        for persona in personas:
            try:
                data.append(read_persona_data(self.storage, persona))
                restore |= self._checkpoint_of(persona)
            except PersonaError as error:
                results[persona.id] = _failure(persona.id, error)
        try:
            outcomes = self._train(data, restore)
        except StorageError as error:
            if self.config.groups.shards > 1:
                raise  # the other ranks wait for this one: only a new group helps
            failure = PersonaError("storage", str(error))
            return [results.get(p.id) or _failure(p.id, failure) for p in personas]
        return [results.get(p.id) or outcomes[p.id] for p in personas]

    def _train(self, data: Sequence[PersonaData], restore: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        results: dict[str, dict[str, Any]] = {}
        outcomes = self.trainer.train(
            data,
            run_id=self.run_id,
            restore=restore,
            checkpoint=lambda persona_id, state: self.storage.put(layout.checkpoint(persona_id), state),
            should_stop=self._stop.is_set,
            progress=self._note,
            warm_scores=self._warm_scores([each.persona_id for each in data]),
        )
        for persona, outcome in zip(data, outcomes, strict=True):
            self._progress.pop(persona.persona_id, None)
            if isinstance(outcome, tuple):
                results[persona.persona_id] = _failure(*outcome)
                continue
            if outcome.mask is not None:
                commit_mask(self.storage, outcome.mask)
            results[persona.persona_id] = {
                "id": persona.persona_id,
                "status": outcome.status,
                "step": outcome.steps,
                "seconds": outcome.seconds,
                "tokens": outcome.tokens,
                "reason": outcome.reason,
                "heldout_loss": outcome.mask.metadata.loss_masked if outcome.mask else None,
            }
        return results

    def train_global(self, request: tuple[Sequence[Persona], float]) -> bytes | None:
        """The one mask for all personas that the evaluation compares with; None on other ranks than 0."""
        personas, ratio = request
        data = [read_persona_data(self.storage, persona) for persona in personas]
        mask = train_global(self.trainer, data, ratio, self.run_id)
        return None if mask is None else mask.to_bytes()

    def evaluate(self, task: Any) -> dict[str, dict[str, float]]:
        return table.evaluate_persona(self.backbone, self.config, task)

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Checkpoint and come back from `train`, now and at every later call."""
        self._stop.set()

    @ray.method(concurrency_group="control")
    def progress(self) -> list[Progress]:
        return list(self._progress.values())

    def _note(self, progress: Progress) -> None:
        self._progress[progress.persona_id] = progress

    def _checkpoint_of(self, persona: Persona) -> dict[str, bytes]:
        try:
            return {persona.id: self.storage.get(layout.checkpoint(persona.id))}
        except NotFoundError:
            return {}

    def _warm_scores(self, persona_ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """For the inits persona:<id> and mean:<id>,<id>: the mean of those masks' scores, for every persona."""
        kind, _, names = self.config.learning.init.partition(":")
        if kind not in ("persona", "mean"):
            return {}
        scores = []
        for name in names.split(","):
            key = layout.mask(name.strip())
            found = Mask.from_bytes(self.storage.get(key), f"{self.storage.url}/{key}").scores_LI
            if found is None:
                raise MaskError(f"{self.storage.url}/{key}: holds no scores; make it with learning.keep_scores: true")
            scores.append(found.float())
        return dict.fromkeys(persona_ids, torch.stack(scores).mean(0))


def _failure(persona_id: str, error: PersonaError) -> dict[str, Any]:
    return {"id": persona_id, "status": "failed", "cause": error.cause, "message": str(error)}


def commit_mask(storage: Storage, mask: Mask) -> None:
    """Store a mask, read it back and verify it; then its checkpoint is gone. A stale mask in its place is replaced."""
    key = layout.mask(mask.metadata.persona_id)
    data = mask.to_bytes()
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        storage.put(key, data)
    stored = storage.get(key)
    if stored != data:
        Mask.from_bytes(stored, f"{storage.url}/{key}")
        raise MaskError(f"{storage.url}/{key}: holds another mask than the one just written")
    storage.delete(layout.checkpoint(mask.metadata.persona_id))


def is_done(storage: Storage, persona: Persona, run_id: str) -> bool:
    """Whether the stored mask is of this description and run."""
    key = layout.mask(persona.id)
    try:
        metadata = metadata_of(storage.get(key), f"{storage.url}/{key}")
    except (NotFoundError, MaskError):
        return False
    return (metadata.persona_sha256, metadata.run_id) == (persona.sha256, run_id)


@dataclass
class Ticket:
    """One call on a group: all its ranks run it, rank 0's answer counts."""

    method: str
    argument: Any
    what: Any
    """The caller's own: comes back with the answer."""
    refs: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class PoolEvent:
    """started and lost name a group; result, error and dropped belong to a ticket."""

    kind: Literal["started", "lost", "result", "error", "dropped"]
    group: str
    ticket: Ticket | None = None
    value: Any = None
    message: str = ""


@dataclass
class Group:
    name: str
    placement: PlacementGroup
    ready: Any
    """Reference that resolves when the placement group has its resources."""
    actors: list[Any] = field(default_factory=list)
    starting: list[Any] = field(default_factory=list)
    info: list[dict[str, Any]] = field(default_factory=list)
    tickets: deque[Ticket] = field(default_factory=deque)
    idle_since: float = field(default_factory=time.monotonic)
    busy_seconds: float = 0.0

    @property
    def usable(self) -> bool:
        return bool(self.actors) and len(self.info) == len(self.actors)


class GroupPool:
    """Keeps between groups.min and groups.max groups and hands them calls."""

    def __init__(self, config: RunConfig, output: str, run_id: str) -> None:
        self.config, self.output, self.run_id = config, output, run_id
        self.groups: list[Group] = []
        self._made = 0
        self._failed_starts = 0

    def scale(self, wanted: int) -> None:
        """Ask for as many groups as `wanted` within the bounds; give idle ones back."""
        settings = self.config.groups
        wanted = max(settings.min if wanted else 0, min(wanted, settings.max))
        while len(self.groups) < wanted:
            self.groups.append(self._new_group())
        now = time.monotonic()
        for group in [g for g in self.groups if not g.tickets and g.usable]:
            idle = now - group.idle_since > settings.idle_seconds
            if len(self.groups) > max(wanted, settings.min) and idle:
                self._remove(group)
        for group in [g for g in self.groups if not g.usable and not g.actors]:
            if len(self.groups) > max(wanted, settings.min):
                self._remove(group)

    def free(self) -> Group | None:
        """The usable group with the fewest calls waiting, if one takes more."""
        usable = [g for g in self.groups if g.usable and len(g.tickets) < QUEUE_DEPTH]
        return min(usable, key=lambda g: len(g.tickets), default=None)

    def submit(self, group: Group, method: str, argument: Any, what: Any) -> None:
        ticket = Ticket(method, argument, what)
        ticket.refs = [getattr(actor, method).remote(argument) for actor in group.actors]
        group.tickets.append(ticket)

    def poll(self, timeout: float) -> list[PoolEvent]:
        """What happened, waiting at most `timeout` seconds for something."""
        watched = self._watched()
        if not watched:
            time.sleep(timeout)
            return []
        refs = list(watched)
        done, _ = ray.wait(refs, num_returns=1, timeout=timeout, fetch_local=False)
        if done and len(refs) > 1:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        events: list[PoolEvent] = []
        for group in {watched[ref].name: watched[ref] for ref in done}.values():
            if group in self.groups:
                events += self._advance(group, set(done))
        return events

    def _watched(self) -> dict[Any, Group]:
        watched = {}
        for group in self.groups:
            if not group.actors:
                watched[group.ready] = group
            watched |= dict.fromkeys(group.starting, group)
            if group.tickets:
                watched |= dict.fromkeys(group.tickets[0].refs, group)
        return watched

    def _advance(self, group: Group, done: set[Any]) -> list[PoolEvent]:
        try:
            if not group.actors:
                self._make_actors(group)
                return []
            if group.starting:
                return self._started(group, done)
            return self._answered(group, done)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if not group.usable:
                self._remove(group)
                self._failed_starts += 1
                if isinstance(cause, UserError):
                    raise cause from None
                if self._failed_starts > MAX_FAILED_STARTS:
                    raise UserError(f"no shard group comes up: {_line(cause)}") from None
                return [PoolEvent("lost", group.name, message=f"did not start: {_line(cause)}")]
            return self._fail(group, cause)
        except RayError as error:
            return self._lose(group, error)

    def _started(self, group: Group, done: set[Any]) -> list[PoolEvent]:
        group.info += ray.get([ref for ref in group.starting if ref in done], timeout=60)
        group.starting = [ref for ref in group.starting if ref not in done]
        if group.starting:
            return []
        group.idle_since = time.monotonic()
        self._failed_starts = 0
        return [PoolEvent("started", group.name)]

    def _answered(self, group: Group, done: set[Any]) -> list[PoolEvent]:
        ticket = group.tickets[0]
        values = {ref: ray.get(ref, timeout=60) for ref in ticket.refs if ref in done}
        if ticket.refs[0] not in values:
            return []
        group.tickets.popleft()
        group.idle_since = time.monotonic()
        return [PoolEvent("result", group.name, ticket, values[ticket.refs[0]])]

    def _fail(self, group: Group, cause: Exception) -> list[PoolEvent]:
        """The call broke: its persona has failed, and the group, whose state nobody knows, is replaced."""
        first, *rest = group.tickets
        self._remove(group)
        return [
            PoolEvent("error", group.name, first, cause, _line(cause)),
            *(PoolEvent("dropped", group.name, ticket) for ticket in rest),
        ]

    def _lose(self, group: Group, error: RayError) -> list[PoolEvent]:
        tickets = list(group.tickets)
        message = f"group {group.name} was lost: {_line(error)}"
        starting = not group.usable and isinstance(error, RayActorError)
        self._remove(group)
        if starting:
            self._failed_starts += 1
        running, waiting = tickets[:1], tickets[1:]
        return [
            PoolEvent("lost", group.name, message=message),
            *(PoolEvent("error", group.name, ticket, None, message) for ticket in running),
            *(PoolEvent("dropped", group.name, ticket) for ticket in waiting),
        ]

    def _new_group(self) -> Group:
        settings = self.config.groups
        self._made += 1
        bundle = {"CPU": settings.num_cpus} | ({"GPU": settings.num_gpus} if settings.num_gpus else {})
        placement = placement_group([bundle] * settings.shards, strategy="PACK")
        return Group(f"g{self._made}", placement, placement.ready())

    def _make_actors(self, group: Group) -> None:
        settings = self.config.groups
        group.actors = [
            ShardActor.options(
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group.placement, index),
            ).remote(self.config, self.output, self.run_id)
            for index in range(settings.shards)
        ]
        address = group.actors[0].address.remote()
        group.starting = [actor.start.remote(rank, settings.shards, address) for rank, actor in enumerate(group.actors)]

    def _remove(self, group: Group) -> None:
        """Actors first: calls to actors of a removed placement group hang."""
        self.groups.remove(group)
        for actor in group.actors:
            ray.kill(actor)
        remove_placement_group(group.placement)

    def control(self, method: str) -> list[Any]:
        """Call a control method on rank 0 of every busy group."""
        return [getattr(g.actors[0], method).remote() for g in self.groups if g.usable and g.tickets]

    def close(self) -> None:
        for group in list(self.groups):
            self._remove(group)


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"
