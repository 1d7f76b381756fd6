"""What a mask saves, counted: parameters and FLOPs per token of the backbone and of what a mask leaves of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from persona_pruner.backbone.channels import find_ffns
from persona_pruner.backbone.files import resolve
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError

BYTES = 2
"""Of a parameter, in bfloat16."""


@dataclass(frozen=True)
class BackboneCosts:
    parameters: int
    flops: int
    """Per token, a multiplication and an addition each counted, behind an empty context (torch's FLOP counter)."""
    ffn_channels: int
    """Of all layers together."""
    channel_parameters: float
    """That go with one FFN channel."""
    channel_flops: float

    def pruned(self, kept: float) -> tuple[float, float]:
        """Parameters and FLOPs per token where this share of the FFN channels is kept."""
        dropped = (1 - kept) * self.ffn_channels
        return self.parameters - dropped * self.channel_parameters, self.flops - dropped * self.channel_flops


@dataclass(frozen=True)
class EfficiencyRow:
    name: str
    unpruned: float
    pruned: float
    """Mean over personas."""


def backbone_costs(path: str) -> BackboneCosts:
    """Of a checkpoint's configuration; its weights are not read. Raises BackboneError."""
    directory = resolve(BackboneConfig(path=path), weights=False)
    try:
        config = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            token = torch.zeros(1, 1, dtype=torch.long)
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: {str(error).splitlines()[0]}") from None
    ffns = find_ffns(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        # Without a cache transformers looks for several texts in one row, for which it would need values.
        model(token, use_cache=True)
    linears = [linear for ffn in ffns for linear in (ffn.output, *ffn.inputs)]
    weights = sum(linear.weight.numel() for linear in linears)
    biases = sum(linear.bias.numel() for ffn in ffns for linear in ffn.inputs if linear.bias is not None)
    channels = sum(ffn.channels for ffn in ffns)
    return BackboneCosts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=counter.get_total_flops(),
        ffn_channels=channels,
        channel_parameters=(weights + biases) / channels,
        channel_flops=2 * weights / channels,
    )


def efficiency_rows(costs: BackboneCosts, kept: Sequence[float], mask_bytes: Sequence[int]) -> list[EfficiencyRow]:
    """`kept`: share of the FFN channels of each persona's mask."""
    parameters, flops = (fmean(values) for values in zip(*(costs.pruned(share) for share in kept), strict=True))
    return [
        EfficiencyRow("parameters", costs.parameters, parameters),
        EfficiencyRow("FFN channels", costs.ffn_channels, fmean(kept) * costs.ffn_channels),
        EfficiencyRow("FLOPs per token", costs.flops, flops),
        EfficiencyRow("bytes of weights in bfloat16", BYTES * costs.parameters, BYTES * parameters),
        EfficiencyRow(
            f"bytes of {len(kept)} personas: a checkpoint each, or one backbone and their masks",
            BYTES * parameters * len(kept), BYTES * costs.parameters + sum(mask_bytes),
        ),
    ]  # fmt: skip
