"""Ray actors that form one DeepSpeed world: their placement, start, calls and end. Nothing waits unless it says so."""

import time
from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from persona_pruner.config.schema import ActorsConfig, GroupsConfig

ANSWER_SECONDS = 60.0
"""How long an answer that is there may take to arrive."""
PEER_SECONDS = 5.0
"""How long Ray may take to notice a dead actor after its peers' connections broke."""


class WorkerError(Exception):
    """An actor's own code raised `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(one_line(cause))
        self.cause = cause


class GroupLostError(Exception):
    """An actor of the group, its node or its answer is gone."""


class ActorGroup:
    """One actor per shard, on as few nodes as possible.

    The actor class `remote` has `address()`, asked of rank 0, and `start(rank, size, address)`, which loads its shard.
    """

    def __init__(self, settings: ActorsConfig | GroupsConfig, remote: Any, arguments: Sequence[Any]) -> None:
        self._settings, self._remote, self._arguments = settings, remote, arguments
        self._placement = placement_group([bundle_of(settings)] * settings.shards, strategy="PACK")
        self._actors: list[Any] = []
        self._pending = [self._placement.ready()]

    @property
    def placed(self) -> bool:
        """Its resources were found, and its actors are starting or ready."""
        return bool(self._actors)

    @property
    def ready(self) -> bool:
        return self.placed and not self._pending

    def pending(self) -> list[Any]:
        """References that `advance` waits for; none once the group is ready."""
        return self._pending

    def advance(self, done: Collection[Any]) -> None:
        """Go on after these references resolved: start the actors, then wait for all of them.

        Raises WorkerError, GroupLostError.
        """
        for ref in [ref for ref in self._pending if ref in done]:
            answer(ref)
            self._pending.remove(ref)
        if not self._pending and not self.placed:
            self._start_actors()

    def _start_actors(self) -> None:
        settings = self._settings
        self._actors = [
            self._remote.options(
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, index),
            ).remote(*self._arguments)
            for index in range(settings.shards)
        ]
        address = self._actors[0].address.remote()
        self._pending = [actor.start.remote(rank, settings.shards, address) for rank, actor in enumerate(self._actors)]

    def wait_until_ready(self, start_seconds: float) -> None:
        """Wait for the resources, however long a cluster takes to grow, then at most `start_seconds` for the actors.

        Raises WorkerError, GroupLostError.
        """
        while not self.ready:
            done = wait_any(self._pending, start_seconds if self.placed else None)
            if not done:
                raise GroupLostError(f"its actors have not started within {start_seconds:.0f} s")
            self.advance(done)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """A call of all ranks; rank 0's reference comes first."""
        return [getattr(actor, method).remote(*arguments) for actor in self._actors]

    def call_and_wait(self, method: str, *arguments: Any) -> Any:
        """Rank 0's answer, once every rank has answered. Raises WorkerError, GroupLostError."""
        return answer(self.call(method, *arguments), None)[0]

    def ask(self, method: str) -> Any:
        """Reference to rank 0's answer to a control method, which answers while another call runs."""
        return getattr(self._actors[0], method).remote()

    def lost_peer(self, refs: Sequence[Any]) -> GroupLostError | None:
        """Whether another rank's death explains the error of one of these calls. Waits up to PEER_SECONDS.

        A rank whose peer died fails with a broken connection, before Ray has noticed the death.
        """
        if len(self._actors) == 1:
            return None
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=PEER_SECONDS, fetch_local=False)
        for ref in done:
            try:
                ray.get(ref, timeout=ANSWER_SECONDS)
            except RayActorError as error:
                return GroupLostError(one_line(error))
            except RayError:
                continue
        return None

    def stop(self) -> None:
        """Actors first: calls to actors of a removed placement group hang."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._placement)


def bundle_of(settings: ActorsConfig | GroupsConfig) -> dict[str, float]:
    """Ray resources of one actor."""
    return {"CPU": settings.num_cpus} | ({"GPU": settings.num_gpus} if settings.num_gpus else {})


def wait_any(refs: Collection[Any], timeout: float | None) -> set[Any]:
    """Those that have resolved, waiting at most `timeout` seconds (None: without limit) for the first."""
    if not refs and timeout is not None:
        time.sleep(timeout)
        return set()
    every = list(refs)
    done, _ = ray.wait(every, num_returns=1, timeout=timeout, fetch_local=False)
    if done and len(every) > 1:
        done, _ = ray.wait(every, num_returns=len(every), timeout=0, fetch_local=False)
    return set(done)


def answer(ref: Any, seconds: float | None = ANSWER_SECONDS) -> Any:
    """Value of a reference, or of several. Raises WorkerError, GroupLostError."""
    try:
        return ray.get(ref, timeout=seconds)
    except RayTaskError as error:
        raise WorkerError(error.cause if isinstance(error.cause, Exception) else error) from None
    except RayError as error:
        raise GroupLostError(one_line(error)) from None


def one_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"
