"""What a submission would do: done, to train, to synthesize. Starts and writes nothing."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from persona_pruner.dataset import is_current
from persona_pruner.manifest import Manifest, Persona
from persona_pruner.masks.catalog import build_catalog
from persona_pruner.run.identity import Identity
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage


@dataclass(frozen=True)
class Plan:
    done: tuple[Persona, ...]
    to_train: tuple[Persona, ...]
    """Their data are there."""
    to_synthesize: tuple[Persona, ...]
    failed_before: tuple[str, ...]
    """Have an error from an earlier submission; they are tried again."""

    def summary(self) -> dict[str, Any]:
        return {
            "done": len(self.done),
            "to_train": len(self.to_train),
            "to_synthesize": len(self.to_synthesize),
            "failed_before": list(self.failed_before),
        }


def masked_personas(personas: Sequence[Persona], storage: Storage, identity: Identity) -> tuple[Persona, ...]:
    """Those that are done: their id has a mask that verifies, of this very description and of this run, and contrasted
    with the persona that the manifest names now."""
    unverified: list[str] = []  # those are made again
    columns = ("persona_sha256", "run_id", "opposite_sha256")
    contrastive = identity.config.learning.is_contrastive
    catalog = build_catalog(storage, identity.config.storage.connections, columns, unverified)
    ids, *decided = (catalog.column(name).to_pylist() for name in ("persona_id", *columns))
    masks = dict(zip(ids, zip(*decided, strict=True), strict=True))

    def is_done(persona: Persona) -> bool:
        opposite = persona.opposite.sha256 if contrastive and persona.opposite is not None else None
        return masks.get(persona.id) == (persona.sha256, identity.run_id, opposite)

    return tuple(persona for persona in personas if is_done(persona))


FEW = 100
DONE_PER_ASKED = 20
"""So many personas are asked for one by one, or one for each so many that are done: sooner than all data are listed,
of which theirs are a small share."""


def make_plan(manifest: Manifest, storage: Storage, identity: Identity) -> Plan:
    """Look at the output and say what is left."""
    done = masked_personas(manifest.personas, storage, identity)
    errors = {keys.persona_of(item.key, keys.ERRORS) for item in storage.list(keys.ERRORS)}
    finished = {p.id for p in done}
    unfinished = [p for p in manifest.personas if p.id not in finished]
    few = len(unfinished) <= max(FEW, len(done) // DONE_PER_ASKED)
    with_data = unfinished if few else _with_objects(unfinished, storage)
    with ThreadPoolExecutor(identity.config.storage.connections) as pool:
        current = list(pool.map(lambda persona: is_current(storage, persona), with_data))
    train = [persona for persona, fits in zip(with_data, current, strict=True) if fits]
    started = {p.id for p in train}
    synthesize = [p for p in unfinished if p.id not in started]
    left = {p.id for p in (*train, *synthesize)}
    return Plan(done, tuple(train), tuple(synthesize), tuple(sorted(errors & left)))


def _with_objects(personas: Sequence[Persona], storage: Storage) -> list[Persona]:
    data = {keys.persona_of(item.key, keys.SYNTHESIS) for item in storage.match(keys.EVERY_DATA)}
    return [persona for persona in personas if persona.id in data]
