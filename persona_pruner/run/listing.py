"""The personas of an output, one by one: how far each is and what its mask is worth."""

from dataclasses import dataclass
from typing import Literal

from persona_pruner.masks.catalog import build_catalog
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

State = Literal["answered", "training", "masked", "failed"]


@dataclass(frozen=True)
class PersonaListing:
    persona_id: str
    state: State
    """The furthest that its objects show. `failed` where a try after everything else ended in an error."""
    unpruned_loss: float | None = None
    masked_loss: float | None = None
    """Both held out, nats per token."""
    ratio: float | None = None
    bytes: int | None = None
    """Size of the mask object."""


def list_personas(storage: Storage) -> list[PersonaListing]:
    """Every persona that has left a trace below `storage`, in order of ids. Raises MaskError, StorageError."""
    listings: dict[str, PersonaListing] = {}
    for item in storage.match(keys.EVERY_DATA):
        persona_id = keys.persona_of(item.key, keys.SYNTHESIS)
        listings[persona_id] = PersonaListing(persona_id, "answered")
    for item in storage.list(keys.CHECKPOINTS):
        persona_id = keys.persona_of(item.key, keys.CHECKPOINTS)
        listings[persona_id] = PersonaListing(persona_id, "training")
    for row in build_catalog(storage, columns=("ratio", "unpruned_loss", "masked_loss")).to_pylist():
        listings[row["persona_id"]] = PersonaListing(
            row["persona_id"], "masked", row["unpruned_loss"], row["masked_loss"], row["ratio"], row["size"]
        )
    for item in storage.list(keys.ERRORS):
        persona_id = keys.persona_of(item.key, keys.ERRORS)
        listings[persona_id] = PersonaListing(persona_id, "failed")
    return [listings[persona_id] for persona_id in sorted(listings)]
