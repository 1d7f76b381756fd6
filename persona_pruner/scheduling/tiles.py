"""Synthesis on the groups that train: blocks of personas (tiles) that wait for a group without other work.

What can be trained goes first, so that a group makes data only where nothing waits for it: whatever there is to do,
every group does it, and no data lie about for long.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from persona_pruner.errors import UserError
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.actor_group import one_line
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.scheduling.pool_events import CallDone, CallFailed, CallLost, CallReturned

SYNTHESIZE = "synthesize"
MAX_LOSSES = 2
"""Groups that may be lost under one tile before its personas are tried one by one."""


@dataclass(frozen=True)
class _Tile:
    personas: tuple[Persona, ...]
    losses: int = 0


class Tiles:
    """`jobs_of` makes jobs of the answer of a worker's `synthesize`, which ends with the seconds that it took."""

    def __init__(
        self,
        tiles: Iterable[Sequence[Persona]] = (),
        jobs_of: Callable[[Any], Iterable[PersonaJob]] = lambda results: results,
    ) -> None:
        self._waiting = deque(_Tile(tuple(personas)) for personas in tiles)
        self._jobs_of = jobs_of
        self._running = 0
        self.busy_seconds = 0.0

    @property
    def left(self) -> int:
        return len(self._waiting) + self._running

    def assign(self, pool: GroupPool) -> None:
        """Give tiles to groups that have nothing else to do."""
        while self._waiting and (group := pool.idle()):
            tile = self._waiting.popleft()
            pool.submit(group, SYNTHESIZE, tile.personas, tile, alone=True)
            self._running += 1

    def take(self, event: CallDone | CallFailed | CallLost | CallReturned) -> Iterable[PersonaJob]:
        """The jobs of a call that has ended. Raises UserError where no persona could be done."""
        self._running -= 1
        tile: _Tile = event.call.context
        match event:
            case CallDone(_, (results, seconds)):
                self.busy_seconds += seconds
                return self._jobs_of(results)
            case CallReturned():
                self._waiting.appendleft(tile)
            case CallFailed(_, error):
                if isinstance(error, UserError):
                    raise error
                return self._try_again(tile, "exception", one_line(error))
            case CallLost(_, message):
                return self._try_again(tile, "group_lost", message)
        return ()

    def _try_again(self, tile: _Tile, cause: str, message: str) -> Iterable[PersonaJob]:
        """Behind the others; a persona that has cost groups by itself has failed."""
        if tile.losses < MAX_LOSSES:
            self._waiting.append(_Tile(tile.personas, tile.losses + 1))
        elif len(tile.personas) > 1:
            self._waiting.extend(_Tile((persona,)) for persona in tile.personas)
        else:
            return [PersonaJob(tile.personas[0], state="ERROR", attempts=1, cause=cause, message=message)]
        return ()
