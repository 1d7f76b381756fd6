"""Checkpoints whose layers differ in FFN channels: `ffn_widths` in config.json, one number per layer.

transformers has one width for all layers; such a checkpoint is loaded by `load_checkpoint` alone.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from persona_pruner.backbone.channels import Ffn, find_ffns

FFN_WIDTHS = "ffn_widths"


def ffn_widths(config: Any) -> list[int] | None:
    """Channels of each layer, where config.json says that they differ."""
    widths = getattr(config, FFN_WIDTHS, None)
    return None if widths is None else [int(width) for width in widths]


def load_checkpoint(path: Path, **options: Any) -> Any:
    """AutoModelForCausalLM.from_pretrained, for plain checkpoints and for those with widths per layer."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=options.get("trust_remote_code", False))
    widths = ffn_widths(config)
    if widths is None:
        with without_bars():
            return AutoModelForCausalLM.from_pretrained(path, **options)
    with _quiet(), without_bars():
        model = AutoModelForCausalLM.from_pretrained(path, ignore_mismatched_sizes=True, **options)
    weights = _tensors(path)
    names = {module: name for name, module in model.named_modules()}
    for ffn, width in zip(find_ffns(model), widths, strict=True):
        for linear in (ffn.output, *ffn.inputs):
            _fill(linear, names[linear], weights)
        set_width(ffn, width)
    return model


def set_width(ffn: Ffn, width: int) -> None:
    """Let the layers' own numbers agree with the weights that they were given."""
    for linear in ffn.inputs:
        linear.out_features = linear.weight.shape[0]
    ffn.output.in_features = width


def _fill(linear: nn.Linear, name: str, weights: dict[str, Any]) -> None:
    def read(part: str, like: Tensor) -> nn.Parameter:
        tensor = weights[f"{name}.{part}"].get_tensor(f"{name}.{part}")
        return nn.Parameter(tensor.to(like.device, like.dtype), requires_grad=False)

    with torch.no_grad():
        linear.weight = read("weight", linear.weight)
        if linear.bias is not None:
            linear.bias = read("bias", linear.bias)


def _tensors(path: Path) -> dict[str, Any]:
    """The open file of every weight."""
    files = [safe_open(file, framework="pt") for file in sorted(path.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No bar for weights that lie here: whoever loads says so in words. Those of a download stay."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers reports every weight of another shape, which here is all of the FFN."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
