"""Shard groups: actors that hold the backbone together, and the pool of groups that grows and shrinks.

A group is one placement group with `groups.shards` actors, one DeepSpeed world. It loads the backbone once and keeps
it. The pool never blocks: everything that a group does is a Ray reference, and `poll` tells what has happened.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import UserError
from persona_pruner.scheduling.actor_group import request_placement_group, start_workers, stop_workers
from persona_pruner.scheduling.training_worker import RemoteTrainingWorker

QUEUE_DEPTH = 2
"""Calls that wait at a group, so that it is never idle between two personas."""
MAX_FAILED_STARTS = 3
MAX_LOST_STARTS = 10
"""Groups in a row that may die while they load before the backbone is held to be the cause."""
PEER_SECONDS = 5.0
"""How long Ray may take to notice a dead actor after its peers' connections broke."""


@dataclass
class GroupCall:
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
    ticket: GroupCall | None = None
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
    deadline: float = float("inf")
    """Monotonic time by which its actors must have started."""
    info: list[dict[str, Any]] = field(default_factory=list)
    calls: deque[GroupCall] = field(default_factory=deque)
    idle_since: float = field(default_factory=time.monotonic)

    @property
    def usable(self) -> bool:
        return bool(self.actors) and len(self.info) == len(self.actors)


class GroupPool:
    """Keeps between groups.min and groups.max groups and hands them calls."""

    def __init__(self, config: RunConfig, output: str, run_id: str) -> None:
        self.config, self.output, self.run_id = config, output, run_id
        self.groups: list[Group] = []
        self.up_seconds = 0.0
        """Time for which groups were up, over all of them."""
        self._polled = time.monotonic()
        self._made = 0
        self._failed_starts = 0

    def scale(self, wanted: int) -> None:
        """Ask for as many groups as `wanted` within the bounds; give idle ones back."""
        settings = self.config.groups
        wanted = max(settings.min if wanted else 0, min(wanted, settings.max))
        while len(self.groups) < wanted:
            self.groups.append(self._new_group())
        now = time.monotonic()
        for group in [g for g in self.groups if not g.calls and g.usable]:
            idle = now - group.idle_since > settings.idle_seconds
            if len(self.groups) > max(wanted, settings.min) and idle:
                self._remove(group)
        for group in [g for g in self.groups if not g.usable and not g.actors]:
            if len(self.groups) > max(wanted, settings.min):
                self._remove(group)

    def free(self) -> Group | None:
        """The usable group with the fewest calls waiting, if one takes more."""
        usable = [g for g in self.groups if g.usable and len(g.calls) < QUEUE_DEPTH]
        return min(usable, key=lambda g: len(g.calls), default=None)

    def submit(self, group: Group, method: str, argument: Any, what: Any) -> None:
        ticket = GroupCall(method, argument, what)
        if method == "train" and group.calls:
            for actor in group.actors:
                actor.prefetch.remote(argument)
        ticket.refs = [getattr(actor, method).remote(argument) for actor in group.actors]
        group.calls.append(ticket)

    def poll(self, timeout: float) -> list[PoolEvent]:
        """What happened, waiting at most `timeout` seconds for something."""
        now = time.monotonic()
        self.up_seconds += sum(group.usable for group in self.groups) * (now - self._polled)
        self._polled = now
        late = [group for group in self.groups if group.starting and now > group.deadline]
        if late:
            limit = self.config.groups.timeout_seconds
            late_error = GetTimeoutError(f"its actors have not started within groups.timeout_seconds = {limit:.0f}")
            return [event for group in late for event in self._lose(group, late_error)]
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
            if group.calls:
                watched |= dict.fromkeys(group.calls[0].refs, group)
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
            lost = self._dead_peer(group)
            return self._lose(group, lost) if lost else self._fail(group, cause)
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
        ticket = group.calls[0]
        values = {ref: ray.get(ref, timeout=60) for ref in ticket.refs if ref in done}
        if ticket.refs[0] not in values:
            ticket.refs = [ref for ref in ticket.refs if ref not in values]
            return []
        group.calls.popleft()
        group.idle_since = time.monotonic()
        return [PoolEvent("result", group.name, ticket, values[ticket.refs[0]])]

    def _dead_peer(self, group: Group) -> RayActorError | None:
        """A rank whose peer died fails with a broken connection: then the peer's death is the cause."""
        refs = list(group.calls[0].refs)
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=PEER_SECONDS, fetch_local=False)
        for ref in done:
            try:
                ray.get(ref, timeout=60)
            except RayActorError as error:
                return error
            except RayError:
                continue
        return None

    def _fail(self, group: Group, cause: Exception) -> list[PoolEvent]:
        """The call broke: its persona has failed, and the group, whose state nobody knows, is replaced."""
        first, *rest = group.calls
        self._remove(group)
        return [
            PoolEvent("error", group.name, first, cause, _line(cause)),
            *(PoolEvent("dropped", group.name, ticket) for ticket in rest),
        ]

    def _lose(self, group: Group, error: RayError) -> list[PoolEvent]:
        calls = list(group.calls)
        message = f"group {group.name} was lost: {_line(error)}"
        starting = not group.usable and isinstance(error, RayActorError | GetTimeoutError)
        self._remove(group)
        if starting:
            self._failed_starts += 1
            if self._failed_starts > MAX_LOST_STARTS:
                raise UserError(f"no shard group comes up: {message}")
        running, waiting = calls[:1], calls[1:]
        return [
            PoolEvent("lost", group.name, message=message),
            *(PoolEvent("error", group.name, ticket, None, message) for ticket in running),
            *(PoolEvent("dropped", group.name, ticket) for ticket in waiting),
        ]

    def _new_group(self) -> Group:
        self._made += 1
        placement = request_placement_group(self.config.groups)
        return Group(f"g{self._made}", placement, placement.ready())

    def _make_actors(self, group: Group) -> None:
        settings = self.config.groups
        arguments = (self.config, self.output, self.run_id)
        group.actors, group.starting = start_workers(RemoteTrainingWorker, group.placement, settings, *arguments)
        group.deadline = time.monotonic() + settings.timeout_seconds

    def _remove(self, group: Group) -> None:
        self.groups.remove(group)
        stop_workers(group.actors, group.placement)

    def control(self, method: str) -> list[Any]:
        """Call a control method on rank 0 of every busy group."""
        return [getattr(g.actors[0], method).remote() for g in self.groups if g.usable and g.calls]

    def close(self) -> None:
        for group in list(self.groups):
            self._remove(group)


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"
