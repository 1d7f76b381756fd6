"""The personas of a run as a server sees them: each mask read on first request, verified, kept, read again in time.

What a request names is an id and nothing else: no path, prefix or bucket. `where` conditions are looked at on every
mask that is read, so that a persona outside them is as unknown as one that does not exist.
"""

import asyncio
import dataclasses
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from persona_pruner.config.schema import PromptConfig
from persona_pruner.errors import ConfigError, MaskError, StorageError, UserError
from persona_pruner.manifest import ID
from persona_pruner.masks.catalog import SCHEMA
from persona_pruner.masks.format import Mask
from persona_pruner.masks.store import MaskStore, select
from persona_pruner.serving.mask_table import RequestMask
from persona_pruner.serving.metrics import Metrics
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError

log = logging.getLogger(__name__)


class UnknownPersonaError(UserError):
    """No persona of this name is served."""


@dataclass(frozen=True)
class ServedPersona:
    id: str
    mask: RequestMask
    system: str
    """Its system prompt; empty where nobody knows its description."""


@dataclass(frozen=True)
class PersonaOptions:
    prompt: PromptConfig
    """Of the run: `read_prompt`."""
    where: tuple[str, ...] = ()
    """Serve only masks whose metadata meet these, as `pull --where`."""
    descriptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By persona id, for masks that do not carry their description."""
    refresh_seconds: float = 5.0
    """A mask is read again when it is asked for and was last read this long ago."""
    capacity: int = 4096
    """Personas kept in memory, known and unknown ones."""


@dataclass(frozen=True)
class _Entry:
    outcome: ServedPersona | UserError
    fresh_until: float


class Personas:
    """Use from one event loop. `store` is read in threads."""

    def __init__(self, store: MaskStore, fingerprint: str, options: PersonaOptions, metrics: Metrics) -> None:
        """fingerprint: of the backbone that is served. Raises ConfigError for a `where` that is none, StorageError."""
        self._store, self._fingerprint, self._options, self._metrics = store, fingerprint, options, metrics
        select(SCHEMA.empty_table(), options.where)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._reading: dict[str, asyncio.Task[_Entry]] = {}

    async def get(self, persona_id: str) -> ServedPersona:
        """Raises UnknownPersonaError, MaskError where the mask does not verify, StorageError where it cannot be read
        and never was."""
        if not ID.fullmatch(persona_id):
            raise UnknownPersonaError(f"there is no persona {persona_id[:80]!r}")
        entry = self._entries.get(persona_id)
        if entry is None or time.monotonic() >= entry.fresh_until:
            task = self._reading.get(persona_id)
            if task is None:
                task = self._reading[persona_id] = asyncio.create_task(self._read(persona_id, entry))
                task.add_done_callback(lambda _: self._reading.pop(persona_id, None))
            entry = await asyncio.shield(task)  # A client that leaves must not end what others wait for.
        if isinstance(entry.outcome, UserError):
            raise entry.outcome.with_traceback(None)
        return entry.outcome

    async def ids(self) -> list[str]:
        return await asyncio.to_thread(self._ids)

    async def check_readable(self) -> None:
        """Raise StorageError where masks cannot be read now."""
        await asyncio.to_thread(self._store.storage.check_readable, keys.MASKS)

    async def _read(self, persona_id: str, old: _Entry | None) -> _Entry:
        fresh_until = time.monotonic() + self._options.refresh_seconds
        outcome: ServedPersona | UserError
        try:
            with self._metrics.mask_load_seconds.time():
                outcome = await asyncio.to_thread(self._load, persona_id)
            self._metrics.mask_loads.labels("ok").inc()
        except (NotFoundError, UnknownPersonaError):
            outcome = UnknownPersonaError(f"there is no persona {persona_id!r}")
            self._metrics.mask_loads.labels("unknown").inc()
        except StorageError as error:
            self._metrics.mask_loads.labels("unreachable").inc()
            log.warning("%s", error)
            if old is not None and isinstance(old.outcome, ServedPersona):
                outcome = old.outcome  # Verified once; the storage will be back.
            else:
                outcome, fresh_until = error, 0.0
        except UserError as error:
            self._metrics.mask_loads.labels("corrupt").inc()
            log.warning("%s", error)
            outcome = error
        entry = self._entries[persona_id] = _Entry(outcome, fresh_until)
        self._entries.move_to_end(persona_id)
        while len(self._entries) > self._options.capacity:
            self._entries.popitem(last=False)
        self._metrics.personas_in_memory.set(len(self._entries))
        return entry

    def _load(self, persona_id: str) -> ServedPersona:
        mask = self._store.load_channels(persona_id)
        mask.check(f"masks/{persona_id}", backbone_fingerprint=self._fingerprint)
        if not self._allowed(mask):
            raise UnknownPersonaError(persona_id)
        description = mask.metadata.persona_description or self._options.descriptions.get(persona_id, "")
        system = self._options.prompt.system.replace("{persona}", description) if description else ""
        return ServedPersona(persona_id, RequestMask.of(mask.packed()), system)

    def _allowed(self, mask: Mask) -> bool:
        if not self._options.where:
            return True
        row = {name: value for name, value in dataclasses.asdict(mask.metadata).items() if name in SCHEMA.names}
        row["kept"] = sum(mask.metadata.kept)
        return bool(select(pa.Table.from_pylist([row], SCHEMA), self._options.where).num_rows)

    def _ids(self) -> list[str]:
        if not self._options.where:
            return self._store.ids()
        try:
            return self._store.where(self._options.where)
        except MaskError:  # One that does not verify: leave it out, not all of them.
            return [persona_id for persona_id in self._store.ids() if self._is_allowed(persona_id)]

    def _is_allowed(self, persona_id: str) -> bool:
        try:
            return self._allowed(self._store.load_channels(persona_id))
        except (MaskError, StorageError):
            return False


def read_prompt(store: MaskStore) -> PromptConfig:
    """The prompt under which the masks of a run were learned; the default where masks were pulled or imported."""
    try:
        settings = json.loads(store.storage.get(keys.RUN))["settings"]["prompt"]
        return PromptConfig(**{name: value for name, value in settings.items() if name in PromptConfig.model_fields})
    except NotFoundError:
        return PromptConfig()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.storage.url}/{keys.RUN}: settings.prompt cannot be read: {error}") from None
