"""Shard groups without Ray, in virtual time: the pool and the scheduler are real, only the actors are not."""

import heapq
import itertools
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from persona_pruner.learning.outcome import Progress, TrainingResult, TrainingStatus
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.actor_group import GroupLostError, WorkerError
from persona_pruner.scheduling.persona_job import PersonaJob


@dataclass(eq=False)
class Reference:
    """What a call of an actor returns; resolves to a value or an error at its time."""

    time: float
    value: Any = None


class World:
    """The clock, and what happens when. `train` decides what becomes of one call of one group."""

    def __init__(self, train: Callable[[Sequence[Persona]], Any] | None = None, seconds: float = 10.0) -> None:
        self.now = 0.0
        self.seconds = seconds
        """Virtual time of one training."""
        self.start_seconds = 1.0
        self.room = 10**9
        """Groups that find resources."""
        self.groups: list[SimulatedGroup] = []
        self._train = train or trained
        self._events: list[tuple[float, int, Reference]] = []
        self._order = itertools.count()

    def clock(self) -> float:
        return self.now

    def launch(self) -> "SimulatedGroup":
        self.groups.append(SimulatedGroup(self))
        return self.groups[-1]

    def after(self, seconds: float, value: Any = None) -> Reference:
        ref = Reference(self.now + seconds, value)
        heapq.heappush(self._events, (ref.time, next(self._order), ref))
        return ref

    def wait(self, refs: Collection[Reference], timeout: float) -> set[Reference]:
        """Turn the clock to the next of these references, by `timeout` at most."""
        if timeout == 0:
            return {ref for ref in refs if ref.time <= self.now}
        end = self.now + timeout
        while self._events and self._events[0][0] <= end:
            ref = heapq.heappop(self._events)[2]
            if ref in refs:
                self.now = max(self.now, ref.time)
                return {ref}
        self.now = end
        # A reference may have resolved before anybody waited for it.
        return {ref for ref in refs if ref.time <= self.now}

    def answer(self, ref: Reference) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def data(self, personas: Sequence[Persona]) -> Any:
        """What becomes of a tile: jobs and seconds, or an error."""
        return [PersonaJob(persona) for persona in personas], self.seconds

    def results(self, personas: Sequence[Persona]) -> Any:
        return self._train(personas)


def trained(personas: Sequence[Persona]) -> list[TrainingResult]:
    return [
        TrainingResult(
            persona_id=persona.id, status=TrainingStatus.DONE, step=24, heldout_loss=1.5, seconds=10.0, tokens=1000,
            busy_seconds=10.0,
        )
        for persona in personas
    ]  # fmt: skip


def failed(personas: Sequence[Persona], cause: str = "exception") -> list[TrainingResult]:
    return [
        TrainingResult(persona_id=p.id, status=TrainingStatus.FAILED, cause=cause, message="broken") for p in personas
    ]


@dataclass(eq=False)
class SimulatedGroup:
    """Stands for ActorGroup with one actor."""

    world: World
    placed: bool = False
    ready: bool = False
    stopped: bool = False
    calls: list[tuple[str, Any]] = field(default_factory=list)
    free_at: float = 0.0

    def __post_init__(self) -> None:
        placed = sum(not group.stopped for group in self.world.groups) < self.world.room
        self._pending = [self.world.after(0.1 if placed else float("inf"))]

    def pending(self) -> list[Reference]:
        return self._pending

    def advance(self, done: Collection[Reference]) -> None:
        if self.placed:
            self._pending, self.ready = [], True
        else:
            self.placed, self._pending = True, [self.world.after(self.world.start_seconds)]

    def call(self, method: str, argument: Any) -> list[Reference]:
        self.calls.append((method, argument))
        if method not in ("train", "synthesize"):
            return [self.world.after(0.1, argument)]
        # Calls of one actor run one after the other.
        self.free_at = max(self.free_at, self.world.now) + self.world.seconds
        if method == "synthesize":
            return [self.world.after(self.free_at - self.world.now, self.world.data(argument))]
        return [self.world.after(self.free_at - self.world.now, self.world.results(argument))]

    def ask(self, method: str) -> Reference:
        self.calls.append((method, None))
        personas = next((argument for name, argument in reversed(self.calls) if name == "train"), ())
        return self.world.after(0.1, [Progress(p.id, 5, 2.0, None, 100, 1.0) for p in personas])

    def lost_peer(self, refs: Sequence[Reference]) -> GroupLostError | None:
        return None

    def stop(self) -> None:
        self.stopped = True


def flaky(seed: int, share: float) -> Callable[[Sequence[Persona]], Any]:
    """Of all trainings `share` end in a failure, as many in an error of the workers, as many in a lost group."""
    draw = random.Random(seed)

    def train(personas: Sequence[Persona]) -> Any:
        match int(draw.random() / share):
            case 0:
                return failed(personas)
            case 1:
                return WorkerError(RuntimeError("out of memory"))
            case 2:
                return GroupLostError("RayActorError: the node is gone")
        return trained(personas)

    return train
