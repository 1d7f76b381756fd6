"""What all sections of the configuration share, and which of their settings make two runs the same.

A setting that can change a mask is marked at its field: `Hashed` where its value does, `HashedContent` where it names
files whose content does. What is not marked (resources, limits, places) never forces a new output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")

Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class HashedWhere:
    """Marks a setting that can change a mask only where `applies(its section)`."""

    applies: Callable[[Any], bool] = lambda section: True


class _ContentMark:
    pass


Hashed = Annotated[T, HashedWhere()]
HashedContent = Annotated[T, _ContentMark()]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class PoolBounds(Section):
    """A number of actors between `min` and `max`."""

    min: Count = 1
    max: Count = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max = {self.max} is below min = {self.min}")
        return self


class BackbonePool(PoolBounds):
    """Actors that hold the backbone, whole or in shards."""

    shards: Hashed[Count] = 1
    """Actors that hold one backbone together, 1/shards each (DeepSpeed ZeRO-3)."""
    num_cpus: Positive = 1.0
    """Ray CPUs per actor (fractions allowed)."""
    num_gpus: NonNegative = 0.0
    """Ray GPUs per actor (fractions allowed)."""
    cpu_threads: Hashed[Count] = 1
    """Threads of one actor's arithmetic; part of what makes scores and masks reproducible."""


def hashed_settings(section: Section) -> dict[str, Any]:
    """The settings below `section` that can change a mask, as JSON values; contents of files are not among them."""
    values = section.model_dump(mode="json", include=set(_marked(section, HashedWhere)))
    for name, subsections in _subsections(section):
        hashed = [hashed_settings(subsection) for subsection in subsections]
        if any(hashed):
            values[name] = hashed if isinstance(getattr(section, name), tuple) else hashed[0]
    return values


def hashed_contents(section: Section, prefix: str = "") -> dict[str, str]:
    """Name of a setting (such as synthesis.sources.0.path) to the path whose content can change a mask."""
    paths = {prefix + name: getattr(section, name) for name in _marked(section, _ContentMark)}
    for name, subsections in _subsections(section):
        several = isinstance(getattr(section, name), tuple)
        for number, subsection in enumerate(subsections):
            paths |= hashed_contents(subsection, f"{prefix}{name}.{number}." if several else f"{prefix}{name}.")
    return {name: path for name, path in paths.items() if path is not None}


def _marked(section: Section, kind: type) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, kind) and (not isinstance(mark, HashedWhere) or mark.applies(section)):
                yield name


def _subsections(section: Section) -> Iterator[tuple[str, list[Section]]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        items = value if isinstance(value, tuple) else (value,)
        if items and all(isinstance(item, Section) for item in items):
            yield name, list(items)
