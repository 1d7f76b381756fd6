"""A mask made into a smaller Hugging Face checkpoint.

Shapes: L layers, I FFN channels, K kept channels of a layer, D model width, T tokens, V vocabulary.
"""

import copy
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.channels import ChannelMasks, Ffn, find_ffns
from persona_pruner.backbone.compact import FFN_WIDTHS, load_checkpoint, set_width, without_bars
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError, MaskError
from persona_pruner.masks.format import Mask

_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size")
_PROBE_TOKENS = 32
_ERROR_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest relative difference of the logits that rounding in this type explains. A wrong channel gives about 1."""


def export_refusal(config: Any) -> str | None:
    """Why masks of this architecture (a transformers configuration) cannot become a smaller checkpoint; None where
    they can. Loads nothing: the architecture is built twice without weights, the second time with fewer channels, and
    nothing but the FFN's own matrices may differ. Raises BackboneError where it cannot be masked at all."""
    plain = _without_weights(config)
    ffns = find_ffns(plain)
    width = _width_setting(config)
    if width is None:
        return f"{type(plain).__name__}: its configuration has none of {', '.join(_WIDTHS)}, so its width is fixed"
    smaller = copy.deepcopy(config)
    fewer = max(ffns[0].channels // 2, 1)
    setattr(smaller, width, fewer)
    narrow = _without_weights(smaller)
    if any(ffn.channels != fewer for ffn in find_ffns(narrow)):
        return f"{type(plain).__name__}: {width} of its configuration does not decide the FFN's width"
    names = {module: name for name, module in narrow.named_modules()}
    own = {names[linear] for ffn in find_ffns(narrow) for linear in (ffn.output, *ffn.inputs)}
    shapes = {name: parameter.shape for name, parameter in plain.named_parameters()}
    for name, parameter in narrow.named_parameters():
        if parameter.shape != shapes[name] and name.rpartition(".")[0] not in own:
            return (
                f"{type(plain).__name__}: {name} spans all FFN channels (a norm over them?), "
                "so that leaving channels out would change the others"
            )
    return None


def export_pruned(mask: Mask, backbone_config: BackboneConfig, to: Path, *, compact: bool = False) -> dict[str, float]:
    """Write the pruned model and its tokenizer to the directory `to`, and compare what was written with the backbone.

    Where layers keep different numbers of channels, each is filled up with zero channels to the widest, so that plain
    transformers loads the checkpoint (`padded_channels` counts them); `compact` leaves them out, and only
    `load_checkpoint` reads it. Returns figures before and after, in the same type: parameters, bytes of weights,
    tokens_per_second (one prompt of 32 tokens); of the written model's logits against those of the masked backbone:
    logit_difference (the largest), logit_error (relative), top_token_agreement (share of positions).
    Raises MaskError where the mask is not of this backbone, `to` is in use or the logits differ by more than rounding;
    BackboneError. Nothing is left in `to` then.
    """
    if to.exists() and any(to.iterdir()):
        raise MaskError(f"{to}: not empty; give a directory that does not exist yet")
    backbone = load_backbone(backbone_config, deepspeed=False)
    mask.check(f"mask of {mask.metadata.persona_id}", backbone_fingerprint=backbone.fingerprint)
    model: Any = backbone.model
    _check_exportable(model.config)
    before = {f"{name}_before": value for name, value in _figures(model).items()}
    with ChannelMasks(model) as masks:
        masks.set(mask.keep_LI.to(model.device).float())
        masked_TV = _probe(model)
    padded = _shrink(model, mask.keep_LI, compact)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with without_bars():
            model.save_pretrained(partial)
        backbone.tokenizer.save_pretrained(partial)
        written = load_checkpoint(partial, dtype=model.dtype).eval().to(model.device)
        comparison = _compare(masked_TV, _probe(written), model.dtype)
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    after = {f"{name}_after": value for name, value in _figures(written).items()}
    return before | after | comparison | {"padded_channels": float(padded)}


def pruned_copy(model: Any, keep_LI: Tensor) -> Any:
    """The model with only the kept channels, as `export_pruned` writes it; `model` stays as it is.

    Raises BackboneError for an architecture that cannot be exported.
    """
    _check_exportable(model.config)
    pruned = copy.deepcopy(model)
    _shrink(pruned, keep_LI, compact=False)
    return pruned


def _check_exportable(config: Any) -> None:
    refusal = export_refusal(config)
    if refusal is not None:
        raise BackboneError(f"cannot be exported: {refusal}; apply the mask to the backbone instead")


def _without_weights(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _width_setting(config: Any) -> str | None:
    return next((name for name in _WIDTHS if getattr(config, name, None)), None)


@torch.no_grad()
def _shrink(model: Any, keep_LI: Tensor, compact: bool) -> int:
    """Drop all other channels from the weights, in place, and say so in the model's configuration.

    Returns how many channels of zeros were added to give all layers the same width.
    """
    widths = keep_LI.sum(1).tolist()
    widest = max(widths)
    even = len(set(widths)) == 1
    for ffn, keep_I in zip(find_ffns(model), keep_LI.to(model.device), strict=True):
        keep_K = keep_I.nonzero().flatten()
        _shrink_one(ffn, keep_K, 0 if compact else widest - len(keep_K))
    name = _width_setting(model.config)
    assert name is not None
    setattr(model.config, name, widest)
    if compact and not even:
        setattr(model.config, FFN_WIDTHS, widths)
        return 0
    return sum(widest - width for width in widths)


def _shrink_one(ffn: Ffn, keep_K: Tensor, padding: int) -> None:
    channels = ffn.channels
    for linear in ffn.inputs:
        blocks = range(linear.out_features // channels)
        rows = [linear.weight[keep_K + block * channels] for block in blocks]
        linear.weight = _parameter(torch.cat([pad(block, (0, 0, 0, padding)) for block in rows]))
        if linear.bias is not None:
            biases = [linear.bias[keep_K + block * channels] for block in blocks]
            linear.bias = _parameter(torch.cat([pad(block, (0, padding)) for block in biases]))
    ffn.output.weight = _parameter(pad(ffn.output.weight[:, keep_K], (0, padding)))
    set_width(ffn, len(keep_K) + padding)


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.clone(memory_format=torch.contiguous_format), requires_grad=False)


def _compare(masked_TV: Tensor, written_TV: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Raises MaskError where the written model is not the masked backbone."""
    error = ((masked_TV - written_TV).norm() / (masked_TV - masked_TV.mean(-1, keepdim=True)).norm()).item()
    largest = (masked_TV - written_TV).abs().max().item()
    if not error <= _ERROR_LIMIT[dtype]:
        raise MaskError(
            f"the smaller model's logits differ from the masked backbone's by {error:.1%} (largest difference "
            f"{largest:.3g}), more than rounding explains; nothing was written: apply the mask to the backbone instead"
        )
    agreement = (masked_TV.argmax(-1) == written_TV.argmax(-1)).float().mean().item()
    return {"logit_difference": largest, "logit_error": error, "top_token_agreement": agreement}


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Logits [T, V] of fixed tokens."""
    return model(_tokens(model), use_cache=False).logits[0].float()


def _figures(model: Any) -> dict[str, float]:
    parameters = list(model.parameters())
    return {
        "parameters": float(sum(p.numel() for p in parameters)),
        "bytes": float(sum(p.numel() * p.element_size() for p in parameters)),
        "tokens_per_second": _speed(model),
    }


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
