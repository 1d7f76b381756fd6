"""A part of a manifest, so that several jobs share one output: `3/10` is the third of ten."""

import hashlib
import math
from dataclasses import dataclass

from persona_pruner.errors import ConfigError
from persona_pruner.manifest import Persona


@dataclass(frozen=True)
class Part:
    """The personas whose id hashes to `number` of `count`: the same ones however the manifest grows or is sorted.

    Opposed personas are of one part, that of the lower id: contrastive masks need the data of both.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Raises ConfigError unless `text` is like 3/10."""
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ConfigError(f"--part {text}: must be like 3/10, the third of ten parts")
        return cls(int(number), int(count))

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    @property
    def name(self) -> str:
        """ "" for the whole manifest; usable in a key."""
        return "" if self.is_whole else f"part-{self.number}-of-{self.count}"

    def __contains__(self, persona: Persona) -> bool:
        pair = [persona.id] if persona.opposite is None else [persona.id, persona.opposite.id]
        digest = hashlib.sha256(min(pair).encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    def overlaps(self, other: "Part") -> bool:
        """Whether some id could be in both."""
        return (self.number - other.number) % math.gcd(self.count, other.count) == 0


WHOLE = Part()
