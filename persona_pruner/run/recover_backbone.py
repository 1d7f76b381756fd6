"""A backbone mended for the masks of an output: read them, mend it, and write it where it does better."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import read_persona_data
from persona_pruner.errors import MaskError
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.learning.shared_recovery import Masked, Recovery, check_free, recover, save_recovered
from persona_pruner.manifest import Persona
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

PARTS = (0.4, 0.55, 0.7, 0.85, 1.0)
"""How much of the change may be kept: it fits the rows that it was learned on better than others."""


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
    """Mend `backbone`, in place, and keep the part of the change that does best on held-out answers, none of it where
    nothing does better. The held-out loss before and after, nats per token."""
    first = _weights(backbone)
    losses = {0.0: _heldout(backbone, config, masked)}
    for step, loss in enumerate(recover(backbone, config, masked, recovery, say), 1):
        if step == 1 or step % 10 == 0:
            say(f"step {step}: {loss:.4f} nats per token")
    mended = _weights(backbone)

    def keep(part: float) -> None:
        with torch.no_grad():
            for name, weight in backbone.model.state_dict().items():
                weight.copy_(first[name].float().lerp(mended[name].float(), part))

    for part in PARTS:
        keep(part)
        losses[part] = _heldout(backbone, config, masked)
        say(f"{part:.0%} of the change: held-out answers at {losses[part]:.4f} nats per token")
    best = min(losses, key=lambda part: losses[part])
    keep(best)
    return losses[0.0], losses[best]


def _weights(backbone: Backbone) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in backbone.model.state_dict().items()}


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


def _heldout(backbone: Backbone, config: RunConfig, masked: Sequence[Masked]) -> float:
    """Mean over the personas; of their training rows where they have no others."""
    return statistics.mean(
        heldout_loss(backbone, config, each.data.description, each.data.heldout or each.data.train, each.keep_LI)
        for each in masked
    )
