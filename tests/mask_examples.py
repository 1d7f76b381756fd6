"""Masks for tests, made without a model."""

import torch

from persona_pruner.masks.format import Mask, MaskMetadata


def mask(persona_id="ada", layers=3, channels=100, kept=40, seed=0, scores=False):
    order = torch.rand(layers, channels, generator=torch.Generator().manual_seed(seed)).argsort(1)
    keep_LI = torch.zeros(layers, channels, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    metadata = MaskMetadata(
        persona_id=persona_id, persona_sha256="p", backbone="tiny", backbone_fingerprint="f" * 64, layers=layers,
        channels=channels, kept=(kept,) * layers, method="ste", ratio=0.6, seed=seed, steps=5, masked_loss=1.25,
        versions={"torch": "2"}, run_id="r",
    )  # fmt: skip
    return Mask(keep_LI, metadata, torch.rand(layers, channels).half() if scores else None)
