"""A backbone mended for the masks of an output: read them, mend it, and write it where it does better."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, Row, read_generic_rows, read_persona_data
from persona_pruner.errors import MaskError
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.learning.persona_tokens import with_foreign_rows
from persona_pruner.learning.shared_recovery import Masked, Recovery, check_free, distilling, recover, save_recovered
from persona_pruner.manifest import Persona
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

HELD_OUT = 8
"""Every eighth foreign row is held out."""


def recover_backbone(
    config: RunConfig,
    personas: Sequence[Persona],
    storage: Storage,
    to: Path,
    recovery: Recovery,
    say: Callable[[str], None] = print,
) -> None:
    """Write the mended backbone to `to`.

    Raises MaskError where there is no mask, a mask is of another backbone, or held-out answers under the masks are no
    better than before; BackboneError where `to` is in use. Nothing is written then.
    """
    check_free(to)
    backbone = load_backbone(config.backbone, deepspeed=False)
    masked = list(_masked(config, personas, storage, backbone, recovery.personas))
    say(f"mending {backbone.name} under {len(masked)} masks, {recovery.steps} steps")
    before, after = mend(backbone, config, masked, recovery, say)
    told = f"held-out answers under the masks: {before:.4f} before, {after:.4f} after (nats per token)"
    if not after < before:
        raise MaskError(f"{told}: not better, nothing was written; try a lower --rate than {recovery.rate:g}")
    save_recovered(backbone, to)
    say(told)
    say(f"written to {to}; use it with --set backbone.path={to}")


def mend(
    backbone: Backbone,
    config: RunConfig,
    masked: Sequence[Masked],
    recovery: Recovery,
    say: Callable[[str], None] = print,
) -> tuple[float, float]:
    """Mend `backbone`, in place. The mean held-out loss of the personas before and after, nats per token.

    Held out are the personas' own rows that are always, of their training rows where there are none, and as large a
    share of foreign rows as it learns from.
    """
    distilling_config = distilling(config, recovery)
    foreign = read_generic_rows(config.learning.objective.generic_rows) if recovery.foreign else ()
    aside = foreign[::HELD_OUT]
    learned = [row for number, row in enumerate(foreign) if number % HELD_OUT]
    rows = [_heldout_rows(each.data, aside, distilling_config) for each in masked]

    def heldout() -> float:
        every = zip(masked, rows, strict=True)
        return statistics.mean(
            heldout_loss(backbone, config, each.data.description, own, each.keep_LI) for each, own in every
        )

    return recover(backbone, config, masked, learned, recovery, heldout, say)


def _heldout_rows(data: PersonaData, foreign: Sequence[Row], config: RunConfig) -> Sequence[Row]:
    mixed = with_foreign_rows(replace(data, train=data.heldout or data.train), foreign, config.learning)
    assert isinstance(mixed, PersonaData)
    return mixed.train


def _masked(
    config: RunConfig, personas: Sequence[Persona], storage: Storage, backbone: Backbone, count: int
) -> list[Masked]:
    """The first `count` of the personas that have a mask in the output."""
    masked: list[Masked] = []
    for persona in personas:
        if len(masked) < count and storage.exists(key := keys.mask(persona.id)):
            where = f"{storage.url}/{key}"
            mask = Mask.from_bytes(storage.get(key), where)
            mask.check(where, persona.id, backbone.fingerprint)
            data = read_persona_data(storage, persona, unfinished=True)
            masked.append(Masked(data, mask.keep_LI))
    if not masked:
        raise MaskError(f"{storage.url}: has no mask of the {len(personas)} personas; make masks first")
    return masked
