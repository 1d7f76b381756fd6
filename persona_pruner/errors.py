"""What a user can do wrong. Each message is one line that names the place, the wrong value and what would be right.

`exit_code` is what the command line and the job exit with:
0 done, 2 bad input (nothing was started or written), 3 some personas failed (the rest are masked),
4 the output cannot be used (storage failed, another job works there), 5 the cluster failed (Ray does not start, groups
are lost or never come up), 75 stopped before the end (submit again to go on).
"""

from collections.abc import Sequence

EXIT_PERSONAS_FAILED = 3
EXIT_STOPPED = 75


class UserError(Exception):
    """A fault that the user can mend; printed as one line without a traceback."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, has a wrong type or a value outside its range."""


class Faults(UserError):
    """Several faults of one input, one line each; at most 20 are kept, `total` counts all of them."""

    def __init__(self, lines: Sequence[str], total: int | None = None) -> None:
        self.lines = list(lines)[:20]
        self.total = len(lines) if total is None else total
        more = [f"... and {self.total - len(self.lines)} more faults"] if self.total > len(self.lines) else []
        super().__init__("\n".join(self.lines + more))


class ManifestError(Faults):
    """Faults of a manifest, each with file and row."""


class BackboneError(UserError):
    """The backbone cannot be found, loaded, or is not of an architecture that we can mask."""


class MaskError(UserError):
    """A mask does not verify, or does not belong to this backbone or persona."""


class SourceError(UserError):
    """An instruction source cannot be read or has no usable row."""


class StorageError(UserError):
    """The object storage refused, failed beyond the deadline, or returned bytes that do not verify."""

    exit_code = 4


class OutputBusyError(StorageError):
    """Another job works on this output."""


class ClusterError(UserError):
    """Ray does not start, or the groups that hold the backbone are lost or never come up."""

    exit_code = 5


class PersonaError(Exception):
    """One persona cannot be done; the others go on. `cause` is a short machine-readable word for errors/<id>.json."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type["PersonaError"], tuple[str, str]]:
        return PersonaError, (self.cause, str(self))
