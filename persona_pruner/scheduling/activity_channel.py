"""From the workers' processes to the driver: what each is doing (activity.py). Nobody waits for anybody.

One small actor per job keeps the last word of every process. Processes tell it twice a second, and only what changed.
"""

import threading
import uuid
from typing import Any

import ray
from ray.exceptions import RayError

from persona_pruner import activity
from persona_pruner.activity import Activity

NAME = "persona-pruner-activity"
SECONDS = 0.5
_forwarding = threading.Lock()
_started = False


class ActivityBoard:
    """Runs as the named actor NAME in the job's namespace."""

    def __init__(self) -> None:
        self._activities: dict[str, Activity] = {}

    def put(self, source: str, value: Activity) -> None:
        self._activities[source] = value

    def read(self) -> list[Activity]:
        return list(self._activities.values())


def forward_activity() -> None:
    """From now on, tell the job's board what this process does. Without a board (a test, another driver): nothing."""
    global _started
    with _forwarding:
        if _started or not ray.is_initialized():
            return
        try:
            board = ray.get_actor(NAME)
        except (ValueError, RayError):
            return
        _started = True
    threading.Thread(target=_forward, args=(board, uuid.uuid4().hex), name="activity", daemon=True).start()


def _forward(board: Any, source: str) -> None:
    told = Activity()
    pause = threading.Event()
    while not pause.wait(SECONDS) and ray.is_initialized():
        value = activity.current()
        if value is not told:
            board.put.remote(source, value)
            told = value


class ActivityReader:
    """The driver's end: starts the board, and reads it without waiting."""

    def __init__(self) -> None:
        remote: Any = ray.remote(num_cpus=0)(ActivityBoard)
        self._board: Any = remote.options(name=NAME).remote()
        self._asked: Any = None
        self._last: list[Activity] = []

    def read(self) -> list[Activity]:
        """What the processes did when the board was last asked."""
        if self._asked is not None:
            done, _ = ray.wait([self._asked], timeout=0)
            if not done:
                return self._last
            try:
                self._last = ray.get(self._asked)
            except RayError:
                return self._last
        self._asked = self._board.read.remote()
        return self._last
