"""Calls of shard groups, and what the pool tells about groups and calls."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class GroupCall:
    """One call of a group: all its ranks run it, rank 0's answer counts."""

    method: str
    argument: Any
    context: Any
    """The caller's own: comes back with the answer."""
    alone: bool = False
    """No other call waits behind it."""
    refs: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class GroupStarted:
    group: str


@dataclass(frozen=True)
class GroupLost:
    group: str
    message: str


@dataclass(frozen=True)
class CallDone:
    call: GroupCall
    value: Any


@dataclass(frozen=True)
class CallFailed:
    """The workers' own code raised `error`."""

    call: GroupCall
    error: Exception


@dataclass(frozen=True)
class CallLost:
    """The group was lost while it ran the call."""

    call: GroupCall
    message: str


@dataclass(frozen=True)
class CallReturned:
    """The call waited at a group that is gone; it never began."""

    call: GroupCall


PoolEvent = GroupStarted | GroupLost | CallDone | CallFailed | CallLost | CallReturned
