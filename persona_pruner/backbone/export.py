"""A mask made into a smaller model: a plain Hugging Face checkpoint with k FFN channels a layer.

Shapes: L layers, I FFN channels, K kept channels, D model width.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.channels import ChannelMasks, Ffn, find_ffns
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError, MaskError
from persona_pruner.masks.format import Mask

_WIDTHS = ("intermediate_size", "ffn_dim")
_PROBE_TOKENS = 32


def export_pruned(mask: Mask, backbone_config: BackboneConfig, to: Path) -> dict[str, float]:
    """Write the pruned model and its tokenizer to the directory `to`, read it back, and compare.

    Returns figures before and after: parameters, bytes on disk, tokens_per_second (one prompt of 32 tokens), and
    logit_difference, the largest between the written model and the backbone with the mask hooked in.
    Raises MaskError where the mask is not of this backbone or `to` is in use, BackboneError.
    """
    if to.exists() and any(to.iterdir()):
        raise MaskError(f"{to}: not empty; give a directory that does not exist yet")
    backbone = load_backbone(backbone_config, deepspeed=False)
    mask.check(f"mask of {mask.metadata.persona_id}", backbone_fingerprint=backbone.fingerprint)
    model: Any = backbone.model
    figures = {
        "parameters_before": float(_parameters(model)),
        "bytes_before": float(_weight_bytes(backbone.path)),
        "tokens_per_second_before": _speed(model),
    }
    with ChannelMasks(model) as masks:
        masks.set(mask.keep_LI.to(model.device).float())
        masked = _probe(model)
    _shrink(model, mask.keep_indices())
    model.save_pretrained(to)
    backbone.tokenizer.save_pretrained(to)
    written = AutoModelForCausalLM.from_pretrained(to, dtype=model.dtype).eval().to(model.device)
    return figures | {
        "parameters_after": float(_parameters(written)),
        "bytes_after": float(_weight_bytes(to)),
        "tokens_per_second_after": _speed(written),
        "logit_difference": (masked - _probe(written)).abs().max().item(),
    }


def _shrink(model: Any, keep_LK: Tensor) -> None:
    """Drop all other channels from the weights, in place, and say so in the model's configuration."""
    names = [name for name in _WIDTHS if hasattr(model.config, name)]
    if not names:
        raise BackboneError(f"{type(model).__name__}: its configuration has none of {', '.join(_WIDTHS)}")
    with torch.no_grad():
        for ffn, keep_K in zip(find_ffns(model), keep_LK.to(model.device), strict=True):
            _shrink_one(ffn, keep_K)
    setattr(model.config, names[0], keep_LK.shape[1])


def _shrink_one(ffn: Ffn, keep_K: Tensor) -> None:
    channels = ffn.channels
    for linear in ffn.inputs:
        rows = torch.cat([keep_K, keep_K + channels]) if linear.out_features == 2 * channels else keep_K
        linear.weight = nn.Parameter(linear.weight[rows].clone(), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias[rows].clone(), requires_grad=False)
        linear.out_features = len(rows)
    ffn.output.weight = nn.Parameter(ffn.output.weight[:, keep_K].clone(), requires_grad=False)
    ffn.output.in_features = len(keep_K)


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Logits [T, V] of fixed tokens."""
    return model(_tokens(model), use_cache=False).logits[0].float()


@torch.no_grad()
def _speed(model: Any, tries: int = 5) -> float:
    tokens = _tokens(model)
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        model(tokens, use_cache=False)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return tokens.numel() / best


def _tokens(model: Any) -> Tensor:
    return (torch.arange(_PROBE_TOKENS, device=model.device) * 7 % model.config.vocab_size)[None]


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))
