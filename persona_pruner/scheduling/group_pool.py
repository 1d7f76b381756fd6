"""The pool of shard groups: grows and shrinks within groups.min and groups.max, and hands calls to its groups.

A group loads the backbone once and keeps it. The pool never blocks: `poll` tells what has happened. No call here costs
more when there are more groups, except for waiting itself.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from persona_pruner.config.schema import GroupsConfig
from persona_pruner.errors import ClusterError, UserError
from persona_pruner.scheduling.actor_group import ActorGroup, GroupLostError, WorkerError, answer, one_line, wait_any
from persona_pruner.scheduling.pool_events import (
    CallDone,
    CallFailed,
    CallLost,
    CallReturned,
    GroupCall,
    GroupLost,
    GroupStarted,
    PoolEvent,
)

QUEUE_DEPTH = 2
"""Calls that wait at a group, so that it is never idle between two personas."""
MAX_FAILED_STARTS = 3
MAX_LOST_STARTS = 10
"""Groups in a row that may die while they load before the backbone is held to be the cause."""
MAX_LOST_CALLS = 3
"""Groups that may be lost under one call of `map`."""
TICK_SECONDS = 0.5


@dataclass(eq=False)
class Group:
    name: str
    actors: ActorGroup
    calls: deque[GroupCall] = field(default_factory=deque)
    since: float = 0.0
    """Monotonic time at which it became idle, or its actors began to start."""

    @property
    def load(self) -> int:
        """Its calls; as many as it takes where one of them is to be alone."""
        return QUEUE_DEPTH if any(call.alone for call in self.calls) else len(self.calls)


class GroupPool:
    """`launch` requests a group; `wait` and `answer` resolve the references of its calls."""

    def __init__(
        self,
        settings: GroupsConfig,
        launch: Callable[[], ActorGroup],
        wait: Callable[[Collection[Any], float], set[Any]] = wait_any,
        answer: Callable[[Any], Any] = answer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self._launch, self._wait, self.answer, self._clock = settings, launch, wait, answer, clock
        self.groups: dict[str, Group] = {}
        self.up_seconds = 0.0
        """Time for which groups were up, over all of them."""
        self._watched: dict[Any, Group] = {}
        self._placing: dict[str, Group] = {}
        self._starting: dict[str, Group] = {}
        """In order of their deadlines."""
        self._by_load: list[dict[str, Group]] = [{} for _ in range(QUEUE_DEPTH + 1)]
        """Ready groups by the number of their calls; idle ones in the order in which they became idle."""
        self._in_turn: deque[str] = deque()
        self._polled = clock()
        self._made = 0
        self._failed_starts = 0

    @property
    def up(self) -> int:
        return len(self.groups) - len(self._placing) - len(self._starting)

    @property
    def busy(self) -> int:
        return self.up - len(self._by_load[0])

    @property
    def placing(self) -> int:
        """Groups that wait for resources."""
        return len(self._placing)

    @property
    def starting(self) -> int:
        """Groups whose actors load the backbone."""
        return len(self._starting)

    def scale(self, wanted: int) -> None:
        """Ask for as many groups as `wanted` within the bounds; give back those that nobody needs."""
        settings = self.settings
        wanted = max(settings.min if wanted else 0, min(wanted, settings.max))
        while len(self.groups) < wanted:
            self._add()
        keep = max(wanted, settings.min)
        while len(self.groups) > keep and self._placing:
            self._remove(next(reversed(self._placing.values())))
        while len(self.groups) > keep and self._by_load[0]:
            longest_idle = next(iter(self._by_load[0].values()))
            if self._clock() - longest_idle.since <= settings.idle_seconds:
                break
            self._remove(longest_idle)

    def idle(self) -> Group | None:
        """A ready group without calls, the one that became so last."""
        return next(reversed(self._by_load[0].values()), None)

    def free(self) -> Group | None:
        """A ready group with the fewest calls, if one takes more."""
        for groups in self._by_load[:QUEUE_DEPTH]:
            if groups:
                return next(reversed(groups.values()))
        return None

    def submit(self, group: Group, method: str, argument: Any, context: Any, alone: bool = False) -> None:
        """`alone`: no other call is to wait behind this one; for an idle group."""
        call = GroupCall(method, argument, context, alone)
        if method == "train" and group.calls:
            group.actors.call("prefetch", argument)
        call.refs = group.actors.call(method, argument)
        self._move(group, call)
        if len(group.calls) == 1:
            self._watch(group, call.refs)

    def poll(self, timeout: float) -> list[PoolEvent]:
        """What happened, waiting at most `timeout` seconds for something. Raises ClusterError where groups never come
        up, UserError where the backbone is at fault."""
        now = self._clock()
        self.up_seconds += self.up * (now - self._polled)
        self._polled = now
        late = next(iter(self._starting.values()), None)
        if late is not None and now > late.since + self.settings.timeout_seconds:
            limit = f"its actors have not started within groups.timeout_seconds = {self.settings.timeout_seconds:.0f}"
            return self._lose(late, GroupLostError(limit))
        done = self._wait(self._watched, timeout)
        events: list[PoolEvent] = []
        for group in {self._watched[ref].name: self._watched[ref] for ref in done}.values():
            events += self._advance(group, done)
        return events

    def map(self, method: str, payloads: Sequence[Any], should_stop: Callable[[], bool]) -> Iterator[tuple[Any, Any]]:
        """(payload, answer) of calls spread over the groups, in any order; ends early when stopped.

        Raises ClusterError where MAX_LOST_CALLS groups were lost under one call, and the workers' own error.
        """
        left = [(payload, 0) for payload in reversed(payloads)]
        running = 0
        while left or running:
            if should_stop():
                return
            self.scale(len(left) + running)
            while left and (group := self.free()):
                payload, losses = left.pop()
                self.submit(group, method, payload, (payload, losses))
                running += 1
            for event in self.poll(TICK_SECONDS):
                if isinstance(event, GroupStarted | GroupLost):
                    continue
                running -= 1
                payload, losses = event.call.context
                match event:
                    case CallDone(_, value):
                        yield payload, value
                    case CallReturned():
                        left.append((payload, losses))
                    case CallLost(_, message):
                        if losses == MAX_LOST_CALLS:
                            raise ClusterError(f"{message}; so were {losses} groups before it, under the same call")
                        left.append((payload, losses + 1))
                    case CallFailed(_, error):
                        raise error

    def ask(self, method: str, limit: int) -> list[Any]:
        """References to rank 0's answers to a control method, from up to `limit` busy groups in turn."""
        refs: list[Any] = []
        for _ in range(len(self._in_turn)):
            if len(refs) == limit:
                break
            name = self._in_turn.popleft()
            group = self.groups.get(name)
            if group is not None:
                self._in_turn.append(name)
                if group.calls:
                    refs.append(group.actors.ask(method))
        return refs

    def resolved(self, refs: Collection[Any]) -> set[Any]:
        """Those of these references that have resolved."""
        return self._wait(refs, 0)

    def close(self) -> None:
        for group in list(self.groups.values()):
            self._remove(group)

    def _add(self) -> None:
        self._made += 1
        group = Group(f"g{self._made}", self._launch())
        self.groups[group.name] = self._placing[group.name] = group
        self._watch(group, group.actors.pending())

    def _remove(self, group: Group) -> None:
        for groups in (self.groups, self._placing, self._starting, *self._by_load):
            groups.pop(group.name, None)
        for ref in [*group.actors.pending(), *(ref for call in group.calls for ref in call.refs)]:
            self._watched.pop(ref, None)
        group.actors.stop()

    def _watch(self, group: Group, refs: Collection[Any]) -> None:
        for ref in refs:
            self._watched[ref] = group

    def _move(self, group: Group, call: GroupCall | None = None) -> None:
        """Add `call` to a ready group's calls, or take its first away, and file the group under its new load."""
        self._by_load[group.load].pop(group.name, None)
        group.calls.append(call) if call is not None else group.calls.popleft()
        self._by_load[group.load][group.name] = group

    def _advance(self, group: Group, done: set[Any]) -> list[PoolEvent]:
        try:
            return self._answered(group, done) if group.actors.ready else self._started(group, done)
        except WorkerError as error:
            return self._raised(group, error.cause)
        except GroupLostError as error:
            return self._lose(group, error)

    def _started(self, group: Group, done: set[Any]) -> list[PoolEvent]:
        for ref in group.actors.pending():
            if ref in done:
                del self._watched[ref]
        was_placed = group.actors.placed
        group.actors.advance(done)
        self._watch(group, group.actors.pending())
        if group.actors.placed and not was_placed:
            self._starting[group.name] = self._placing.pop(group.name)
            group.since = self._clock()
        if not group.actors.ready:
            return []
        self._by_load[0][group.name] = self._starting.pop(group.name)
        self._in_turn.append(group.name)
        group.since = self._clock()
        self._failed_starts = 0
        return [GroupStarted(group.name)]

    def _answered(self, group: Group, done: set[Any]) -> list[PoolEvent]:
        call = group.calls[0]
        first = call.refs[0]
        values = {ref: self.answer(ref) for ref in call.refs if ref in done}
        for ref in values if first not in values else call.refs:
            self._watched.pop(ref, None)
        if first not in values:
            call.refs = [ref for ref in call.refs if ref not in values]
            return []
        self._move(group)
        group.since = self._clock()
        if group.calls:
            self._watch(group, group.calls[0].refs)
        return [CallDone(call, values[first])]

    def _raised(self, group: Group, cause: Exception) -> list[PoolEvent]:
        if not group.actors.ready:
            self._remove(group)
            self._failed_starts += 1
            if isinstance(cause, UserError):
                raise cause
            if self._failed_starts > MAX_FAILED_STARTS:
                raise ClusterError(f"no shard group comes up: {one_line(cause)}")
            return [GroupLost(group.name, f"group {group.name} did not start: {one_line(cause)}")]
        if peer := group.actors.lost_peer(group.calls[0].refs):
            return self._lose(group, peer)
        # Fail the persona and replace the group: its ranks may be mid-collective.
        self._remove(group)
        failed, *waiting = group.calls
        return [CallFailed(failed, cause), *map(CallReturned, waiting)]

    def _lose(self, group: Group, error: GroupLostError) -> list[PoolEvent]:
        message = f"group {group.name} was lost: {error}"
        never_started = group.actors.placed and not group.actors.ready
        self._remove(group)
        if never_started:
            self._failed_starts += 1
            if self._failed_starts > MAX_LOST_STARTS:
                raise ClusterError(f"no shard group comes up: {message}")
        calls = list(group.calls)
        return [
            GroupLost(group.name, message),
            *(CallLost(call, message) for call in calls[:1]),
            *map(CallReturned, calls[1:]),
        ]
