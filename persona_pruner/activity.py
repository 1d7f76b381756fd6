"""What this process is doing: told from deep inside a computation, read by whoever shows it.

A phase without counts is what goes on now (loading a backbone); counted phases add up work and tokens.
"""

import threading
from dataclasses import dataclass, field

LOADING = "loading the backbone"
SCORING = "scoring"
ANSWERING = "answering"


@dataclass(frozen=True)
class Count:
    done: int = 0
    tokens: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.done + other.done, self.tokens + other.tokens)


@dataclass(frozen=True)
class Activity:
    """`phase` is "" where nothing uncounted goes on."""

    phase: str = ""
    counts: dict[str, Count] = field(default_factory=dict)


_lock = threading.Lock()
_activity = Activity()


def begin(phase: str) -> None:
    """This phase goes on now; "" ends it."""
    global _activity
    with _lock:
        _activity = Activity(phase, _activity.counts)


def count(phase: str, done: int = 0, tokens: int = 0) -> None:
    """So much more of `phase` is done."""
    global _activity
    with _lock:
        counts = _activity.counts | {phase: _activity.counts.get(phase, Count()) + Count(done, tokens)}
        _activity = Activity(_activity.phase, counts)


def current() -> Activity:
    return _activity
