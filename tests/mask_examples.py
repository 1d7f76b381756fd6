"""Masks for tests, made without a model."""

import torch

from persona_pruner.masks.format import Mask, MaskMetadata
from persona_pruner.masks.weight_mask import WeightMask, WeightMaskMetadata, pack
from persona_pruner.storage import keys

MATRICES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in (
        ("self_attn.q_proj", (6, 20, 8)), ("mlp.up_proj", (30, 8, 3)), ("mlp.down_proj", (8, 30, 12)),
    )
}  # fmt: skip


def mask(persona_id="ada", layers=3, channels=100, kept=40, seed=0, scores=False):
    order = torch.rand(layers, channels, generator=torch.Generator().manual_seed(seed)).argsort(1)
    keep_LI = torch.zeros(layers, channels, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    metadata = MaskMetadata(
        persona_id=persona_id, persona_sha256="p", backbone="tiny", backbone_fingerprint="f" * 64, layers=layers,
        channels=channels, kept=(kept,) * layers, method="ste", ratio=0.6, seed=seed, steps=5, masked_loss=1.25,
        versions={"torch": "2"}, run_id="r",
    )  # fmt: skip
    return Mask(keep_LI, metadata, torch.rand(layers, channels).half() if scores else None)


def weight_mask(persona_id="ada", seed=0, matrices=MATRICES, **metadata):
    generator, packed = torch.Generator().manual_seed(seed), {}
    for name, (rows, columns, kept) in matrices.items():
        order = torch.rand(rows, columns, generator=generator).argsort(1)
        packed[name] = pack(torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order[:, :kept], True))
    return WeightMask(
        packed,
        WeightMaskMetadata(
            persona_id=persona_id, persona_sha256="p", backbone="tiny", backbone_fingerprint="f" * 64, method="wanda",
            ratio=0.6, seed=0, steps=0, run_id="r", matrices=matrices, **metadata,
        ),
    )  # fmt: skip


def put_mask(storage, identity, persona, run_id=None, opposite_sha256=None):
    """Commit a mask of this persona as the run of `identity` would."""
    metadata = MaskMetadata(
        persona_id=persona.id, persona_sha256=persona.sha256, backbone="tiny",
        backbone_fingerprint=identity.fingerprint, layers=3, channels=64, kept=(32,) * 3, method="ste", ratio=0.5,
        seed=0, steps=20, run_id=run_id or identity.run_id, opposite_sha256=opposite_sha256,
    )  # fmt: skip
    keep = torch.zeros(3, 64, dtype=torch.bool)
    keep[:, :32] = True
    storage.put(keys.mask(persona.id), Mask(keep, metadata).to_bytes())
