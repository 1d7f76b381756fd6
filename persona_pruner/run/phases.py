"""A phase of a run: what is done of how much, how fast, and how long it will take."""

from dataclasses import dataclass
from typing import Any

from persona_pruner.activity import ANSWERING, SCORING

TRAINING = "training"
COMPARING = "comparing"
ASKING = "asking"
JUDGING = "judging"
UNITS = {SCORING: "questions", ANSWERING: "answers"} | dict.fromkeys((TRAINING, COMPARING, ASKING, JUDGING), "personas")


@dataclass
class Phase:
    """Times are of one monotonic clock."""

    name: str
    began: float
    total: int = 0
    """0 where nothing is counted."""
    done: float = 0.0
    tokens: int = 0
    detail: str = ""
    ended: float | None = None
    first: tuple[float, float, int] | None = None
    """(time, done, tokens) of the first count: rates and estimates begin there and leave out the start-up."""

    def count(self, now: float, done: float, tokens: int) -> None:
        self.done, self.tokens = done, tokens
        if self.first is None:
            self.first = (now, done, tokens)

    def seconds(self, now: float) -> float:
        return (now if self.ended is None else self.ended) - self.began

    def left(self, now: float) -> float | None:
        """Estimated seconds to its end; None where there is nothing to estimate from."""
        if self.first is None or self.ended is not None or self.done <= self.first[1]:
            return None
        return (now - self.first[0]) / (self.done - self.first[1]) * max(0.0, self.total - self.done)

    def tokens_per_second(self, now: float) -> float:
        end = now if self.ended is None else self.ended
        if self.first is None or end <= self.first[0]:
            return 0.0
        return (self.tokens - self.first[2]) / (end - self.first[0])

    def to_dict(self, now: float) -> dict[str, Any]:
        left = self.left(now)
        return {
            "name": self.name,
            "done": int(self.done),
            "total": self.total,
            "unit": UNITS.get(self.name, ""),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second(now), 1),
            "seconds": round(self.seconds(now), 1),
            "left_seconds": None if left is None else round(left),
            "ended": self.ended is not None,
            "detail": self.detail,
        }
