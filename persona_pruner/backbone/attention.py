"""Attention whose query heads share their key-value head in one product: `backbone.attention: grouped`.

On a CPU torch's fused kernel is slow where heads are grouped and rows stand behind a prefix. A layer of SmolLM2-135M
in bfloat16 on one core: forward and backward of 12 rows of 80 tokens behind 59 take 16 ms instead of 46, one token of
96 rows behind 150 takes 1.4 ms instead of 15.

Shapes: B rows, H query heads, K key-value heads, T queries, S keys, C width of a head.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from persona_pruner.errors import BackboneError

NAME = "grouped"


def grouped_attention(
    module: Any,
    query_BHTC: Tensor,
    key_BKSC: Tensor,
    value_BKSC: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The values [B, T, H, C] that each query sees; called by transformers. `attention_mask` [B or 1, 1, T, S] is added
    to the logits. Raises BackboneError for a model with capped logits or sinks."""
    if options.get("softcap") or options.get("s_aux") is not None:
        raise BackboneError(f"{type(module).__name__} caps its attention or has sinks; set backbone.attention to eager")
    rows, heads, queries, width = query_BHTC.shape
    groups, keys = key_BKSC.shape[1:3]
    folded = (rows, groups, heads // groups * queries)
    logits = (query_BHTC * (scaling or width**-0.5)).reshape(*folded, width) @ key_BKSC.transpose(-1, -2)
    if attention_mask is not None:
        by_head = logits.view(rows, groups, heads // groups, queries, keys)
        logits = (by_head + attention_mask[:, :, None, :, :keys]).view(*folded, keys)
    seen = logits.softmax(-1) @ value_BKSC
    return seen.view(rows, heads, queries, width).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
