"""Forward passes in which a persona's prompt prefix runs once, its rows behind it, and logits exist where needed.

Shapes: P prefixes, B rows, T tokens, D model width, N answer positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from persona_pruner.backbone.channels import ChannelMasks, decoder_layers
from persona_pruner.backbone.load import Backbone
from persona_pruner.errors import BackboneError


class _RecordingLayer(DynamicLayer):
    """One layer's keys and values of the last run. It never grows: recomputed layers run twice."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values of prefixes, seen by rows behind them. Nothing is stored: passes are independent."""

    def __init__(self, keys: Tensor, values: Tensor, prefix_B: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.prefix_B = keys, values, prefix_B
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._join(self.keys, key_states), self._join(self.values, value_states)

    def _join(self, before: Any, states: Tensor) -> Tensor:
        rows = states.shape[0]
        before = before.expand(rows, -1, -1, -1) if before.shape[0] == 1 else before.index_select(0, self.prefix_B)
        return torch.cat([before, states], dim=-2)


@dataclass
class PrefixCache:
    """Keys and values [P, heads, T, head width] of every layer, and the unpadded lengths of the P prefixes."""

    layers: list[tuple[Tensor, Tensor]]
    lengths: list[int]

    def leaves(self) -> "PrefixCache":
        """The same values cut from their graph, collecting gradients of their own where the graph can use them: nothing
        below the first mask learns, and neither does what stands behind it there."""
        return PrefixCache([(_leaf(k), _leaf(v)) for k, v in self.layers], self.lengths)

    def tensors(self) -> list[Tensor]:
        return [tensor for pair in self.layers for tensor in pair]


class BackboneRunner:
    """Forward passes of one backbone with masks. `masks` is attached for the runner's lifetime; `close` detaches."""

    def __init__(self, backbone: Backbone, *, checkpoint_layers: bool = False) -> None:
        self.backbone = backbone
        self.model: Any = backbone.model
        self.masks = ChannelMasks(backbone.model).attach()
        config: Any = backbone.model.config
        self.pad: int = config.pad_token_id or 0
        self._recomputed = self._recompute_layers() if checkpoint_layers else []
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        self._cacheable = kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
        self._window = getattr(config, "sliding_window", None) if DynamicSlidingWindowLayer in kinds else None
        self._rope_limit, growing = _rope_limit(backbone.model)
        self._resets = [
            backbone.model.base_model.register_forward_pre_hook(lambda *_: _reset_rope(growing))  # type: ignore[union-attr,operator]
        ] if growing else []  # fmt: skip

    def close(self) -> None:
        self.masks.detach()
        for hook in self._resets:
            hook.remove()
        for layer in self._recomputed:
            del layer.forward

    def __enter__(self) -> "BackboneRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def length_dependent(self) -> bool:
        """Whether a row that is not behind a shared prefix must run alone, since the longest row of a pass decides the
        positions of all (longrope, dynamic rope)."""
        return self._rope_limit is not None

    def can_share(self, prefixes: Sequence[Sequence[int]], longest: int) -> bool:
        """Whether rows of up to `longest` tokens give exactly the plain result behind a shared prefix.

        Not with caches that hold more than keys and values, nor where a rope turns differently from some length on.
        Windows count positions: padded prefixes would shift them.
        """
        lengths = {len(prefix) for prefix in prefixes}
        if not self._cacheable or 0 in lengths:
            return False
        total = max(lengths) + longest
        if self._rope_limit is not None and total > self._rope_limit:
            return False
        return self._window is None or len(lengths) == 1 or total <= self._window

    def prefix(self, prefixes: Sequence[Sequence[int]]) -> PrefixCache:
        """Keys and values of prompts, with the masks that are set (one for all, or one a prefix)."""
        layers: list[Any] = [_RecordingLayer() for _ in self.masks.ffns]
        self._body(self._pad(prefixes), past_key_values=_cache(layers), use_cache=True)
        return PrefixCache([(layer.keys, layer.values) for layer in layers], [len(p) for p in prefixes])

    def hidden(self, tokens_BT: Tensor, prefix: PrefixCache | None = None, prefix_B: Tensor | None = None) -> Tensor:
        """Final hidden states [B, T, D] of right-padded rows, each behind prefix number `prefix_B` [B] if given.

        Without a prefix the rows are whole prompts. Values at padding are meaningless.
        """
        if prefix is None:
            return self._body(tokens_BT, use_cache=False)
        assert prefix_B is not None
        rows, length = tokens_BT.shape
        width = max(prefix.lengths)
        begins_B = torch.tensor(prefix.lengths, device=tokens_BT.device)[prefix_B]
        padding = None
        if min(prefix.lengths) < width:
            padding = torch.ones(rows, width + length, dtype=torch.long, device=tokens_BT.device)
            padding[:, :width] = torch.arange(width, device=tokens_BT.device) < begins_B[:, None]
        return self._body(
            tokens_BT,
            past_key_values=_cache([_PrefixLayer(k, v, prefix_B) for k, v in prefix.layers]),
            use_cache=True,
            attention_mask=padding,
            position_ids=begins_B[:, None] + torch.arange(length, device=tokens_BT.device),
        )

    def logits(self, hidden_ND: Tensor, vocabulary_V: Tensor | None = None) -> Tensor:
        """Logits [N, V] of final hidden states, as the model's own forward gives them; of some token ids only where
        `vocabulary_V` (int64) names them."""
        config, head = self.model.config, self.model.get_output_embeddings()
        if vocabulary_V is None:
            out = self.backbone.enter(lambda: head(hidden_ND))
        else:
            with self.backbone.gathered_parameters([p for p in (head.weight, head.bias) if p is not None]):
                weight_VD = head.weight.detach().index_select(0, vocabulary_V)
                bias_V = None if head.bias is None else head.bias.detach().index_select(0, vocabulary_V)
            out = nn.functional.linear(hidden_ND, weight_VD, bias_V)
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        out = out if scale == 1 else out * scale
        cap = getattr(config, "final_logit_softcapping", None)
        return torch.tanh(out / cap) * cap if cap else out

    def check_head(self) -> None:
        """Raise BackboneError unless body and head, run apart, give the model's own logits."""
        tokens = torch.arange(4, device=self.backbone.device)[None] % self.model.config.vocab_size
        self.masks.set(None)
        with torch.no_grad():
            apart = self.logits(self.hidden(tokens)[0])
            own = self.backbone.enter(lambda: self.model(tokens, use_cache=False).logits)[0]
        if not torch.allclose(apart.float(), own.float(), rtol=1e-3, atol=1e-3):
            raise BackboneError(f"{type(self.model).__name__}: its logits are not its output layer on its last hidden "
                                "state; this architecture cannot be trained")  # fmt: skip

    def _body(self, tokens_BT: Tensor, **options: Any) -> Tensor:
        return self.backbone.enter(lambda: self.model.base_model(tokens_BT, **options).last_hidden_state)

    def _recompute_layers(self) -> list[Any]:
        """Make every decoder layer recompute its activations in the backward pass; returns the changed layers.

        transformers' own switch turns caches off, and with them the shared prefix.
        """
        layers = decoder_layers(self.model)
        for layer in layers:
            layer.forward = self._recompute(layer.forward)
        return list(layers)

    def _recompute(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            masks = self.masks.active

            def run(*args: Any, **kwargs: Any) -> Any:
                now, self.masks.active = self.masks.active, masks
                try:
                    return plain(*args, **kwargs)
                finally:
                    self.masks.active = now

            return checkpoint(run, *args, use_reentrant=False, **kwargs)

        return forward

    def _pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return pad_rows(rows, self.pad).to(self.backbone.device)


def pad_rows(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Rows as int64 [B, T], padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def _leaf(states: Tensor) -> Tensor:
    return states.detach().requires_grad_(states.requires_grad)


def _cache(layers: list[Any]) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = layers
    return cache


def _rope_limit(model: nn.Module) -> tuple[int | None, list[Any]]:
    """Up to how many tokens positions are turned by the same frequencies (None: any number), and the modules whose
    frequencies remember the longest pass so far."""
    limits, growing = [], []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if isinstance(kind, str) and "dynamic" in kind:
                limits.append(module.original_max_seq_len)
                growing.append((module, layer_type))
            elif kind == "longrope":
                parameters = module.config.rope_parameters  # type: ignore[union-attr]
                parameters = parameters if layer_type is None else parameters[layer_type]  # type: ignore[index]
                limits.append(parameters["original_max_position_embeddings"])  # type: ignore[index]
    return (min(limits) if limits else None), growing  # type: ignore[type-var,return-value]


def _reset_rope(growing: Sequence[tuple[Any, str | None]]) -> None:
    """Forget earlier passes: a result must not depend on what ran before."""
    for module, layer_type in growing:
        prefix = "" if layer_type is None else f"{layer_type}_"
        frequencies = getattr(module, f"{prefix}inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq").to(frequencies.device)
        module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
