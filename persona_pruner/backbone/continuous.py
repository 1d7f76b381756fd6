"""Continuous batching: the next prompt takes the place of a row that has ended, behind its persona's shared prefix.

Shape suffixes: B rows, T tokens, S places of the cache, D model width, V vocabulary, M masks, L layers, I channels.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from persona_pruner.backbone.decoding import (
    Decoder,
    PaddedDecoder,
    Prompt,
    Sampled,
    Sampling,
    choose,
    cut_at_end,
    empty_cache,
    masks_of_rows,
)
from persona_pruner.backbone.forward import BackboneRunner, PrefixCache, pad_rows


class _SlotLayer(DynamicLayer):
    """One layer's keys and values [B, heads, S, head width], place = position. Rows stand at different positions."""

    def __init__(self, rows: int, places: int, like: Tensor) -> None:
        super().__init__()
        self.keys: Any = like.new_zeros(rows, like.shape[1], places, like.shape[3])
        self.values: Any = torch.zeros_like(self.keys)
        self.is_initialized = True
        self.at_B = torch.zeros(0, dtype=torch.long, device=like.device)
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store one token of each active row at its own place; give the places seen so far."""
        rows = torch.arange(len(self.at_B), device=self.at_B.device)
        for stored, states in ((self.keys, key_states), (self.values, value_states)):
            stored[rows, :, self.at_B] = states[:, :, 0].to(stored.dtype)
        return self.keys[: len(rows), :, : self.seen], self.values[: len(rows), :, : self.seen]

    def get_seq_length(self) -> int:
        return self.seen - 1


class _PrefillLayer(DynamicLayer):
    """One layer's keys and values of new tokens, kept apart from those of the prefix that they stand behind."""

    def __init__(self, prefix: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self.prefix = prefix
        self.new: tuple[Tensor, Tensor] | None = None
        if prefix is not None:
            self.keys, self.values = prefix
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new = (key_states, value_states)
        if self.prefix is None:
            return self.new
        rows = key_states.shape[0]
        keys, values = (
            torch.cat([before.expand(rows, -1, -1, -1), states], -2)
            for before, states in zip(self.prefix, self.new, strict=True)
        )
        return keys, values


@dataclass(eq=False)
class _Row:
    """A prompt under way. `length` tokens are in the cache; the last of `tokens` is not yet."""

    number: int
    prompt: Prompt
    length: int
    tokens: list[int] = field(default_factory=list)

    @property
    def prefix(self) -> tuple[tuple[int, ...], int]:
        return prefix_of(self.prompt)


def prefix_of(prompt: Prompt) -> tuple[tuple[int, ...], int]:
    """What rows share: the tokens of the prefix and the mask that they are run under."""
    return prompt.prefix, prompt.mask


class SlotDecoder:
    """Continuous batching. Exact where `supports` says so: masks of each row are built from its own positions.

    Passes depend on the prompts and their order only, not on anything that ran before.
    """

    def __init__(self, runner: BackboneRunner, sampling: Sampling, masks_MLI: Tensor | None = None) -> None:
        """masks_MLI: bool or floating [M, L, I]; without them the runner's own."""
        self._runner, self._sampling, self._masks_MLI = runner, sampling, masks_MLI
        self._backbone = runner.backbone
        self._windows = [getattr(layer, "sliding_window", None) for layer in empty_cache(runner).layers]

    @staticmethod
    def supports(runner: BackboneRunner) -> bool:
        """Whether the model's layers all attend fully or in a sliding window, with rotary positions and masks of our
        own. ALiBi derives positions from a mask of two dimensions, and flash attention takes no mask."""
        layers = {type(layer) for layer in empty_cache(runner).layers}
        kinds = set(getattr(runner.model.config, "layer_types", None) or ["full_attention"])
        return (
            layers <= {DynamicLayer, DynamicSlidingWindowLayer}
            and kinds <= {"full_attention", "sliding_attention"}
            and hasattr(runner.model.base_model, "rotary_emb")
            and not str(runner.model.config._attn_implementation).startswith("flash")
        )

    @torch.no_grad()
    def decode(self, prompts: Sequence[Prompt]) -> list[Sampled]:
        """Each turn runs one pass on all ranks: either the prompts of free rows, or one token of each active row."""
        self._prefixes = self._run_prefixes(prompts)
        self._places = max((len(p.prefix) + len(p.suffix) + len(p.draws_T) for p in prompts), default=0)
        self._layers: list[_SlotLayer] = []
        self._active: list[_Row] = []
        self._sampled: dict[int, Sampled] = {}
        waiting = deque(enumerate(prompts))
        while True:
            room = self._sampling.batch_size - len(self._active)
            refill = bool(waiting) and room >= min(len(waiting), max(1, self._sampling.batch_size // 8))
            turn = torch.tensor([len(self._active), int(refill)], device=self._backbone.device)
            any_active, any_refill = self._backbone.all_reduce(turn).tolist()
            if any_refill:
                self._prefill(waiting if refill else deque(), room)
            elif any_active:
                self._step()
            else:
                return [self._sampled[i] for i in range(len(prompts))]

    def _run_prefixes(self, prompts: Sequence[Prompt]) -> dict[tuple[tuple[int, ...], int], PrefixCache]:
        """Keys and values of every prefix and mask that a rank needs; a prefix without tokens has none."""
        own = sorted({prefix_of(prompt) for prompt in prompts if prompt.prefix})
        needed = dict.fromkeys(each for of_rank in self._backbone.gather(own) for each in of_rank)
        caches = {}
        for prefix, mask in needed:
            self._set_masks([mask])
            caches[prefix, mask] = self._runner.prefix([prefix])
        return caches

    def _set_masks(self, numbers: Sequence[int]) -> None:
        if self._masks_MLI is not None:
            self._runner.masks.set(masks_of_rows(self._masks_MLI, numbers))

    def _prefill(self, waiting: deque[tuple[int, Prompt]], room: int) -> None:
        """Run the next prompts that share a prefix and give them rows of their own."""
        rows: list[_Row] = []
        while waiting and len(rows) < room and (not rows or prefix_of(waiting[0][1]) == rows[0].prefix):
            number, prompt = waiting.popleft()
            rows.append(_Row(number, prompt, len(prompt.prefix) + len(prompt.suffix)))
        if not rows:
            self._idle_pass()
            return
        self._set_masks([rows[0].prompt.mask])
        prefix = self._prefixes.get(rows[0].prefix)
        begin = len(rows[0].prompt.prefix)
        layers = (
            [_PrefillLayer(pair) for pair in prefix.layers] if prefix else [_PrefillLayer(None) for _ in self._windows]
        )
        tokens_BT = pad_rows([row.prompt.suffix for row in rows], self._runner.pad).to(self._backbone.device)
        positions_1T = begin + torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        hidden_BTD = self._body(tokens_BT, layers, None, positions_1T.expand(len(rows), -1))
        ends_B = torch.tensor([row.length - begin - 1 for row in rows], device=tokens_BT.device)
        logits_BV = self._runner.logits(hidden_BTD[torch.arange(len(rows), device=ends_B.device), ends_B])
        self._store(rows, layers, begin)
        self._active += rows
        self._take(rows, logits_BV)

    def _store(self, rows: Sequence[_Row], layers: Sequence[_PrefillLayer], begin: int) -> None:
        """Copy what the prompts have left into the rows behind the active ones."""
        first = len(self._active)
        for number, layer in enumerate(layers):
            assert layer.new is not None
            if len(self._layers) <= number:
                self._layers.append(_SlotLayer(self._sampling.batch_size, self._places, layer.new[0]))
            slots = self._layers[number]
            for stored, pair in ((slots.keys, 0), (slots.values, 1)):
                if layer.prefix is not None:
                    stored[first : first + len(rows), :, :begin] = layer.prefix[pair]
                width = layer.new[pair].shape[2]
                stored[first : first + len(rows), :, begin : begin + width] = layer.new[pair][
                    :, :, : stored.shape[2] - begin
                ]

    def _step(self) -> None:
        """One more token of each active row."""
        if not self._active:
            self._idle_pass()
            return
        device = self._backbone.device
        self._set_masks([row.prompt.mask for row in self._active])
        at_B = torch.tensor([row.length for row in self._active], device=device)
        seen = max(row.length for row in self._active) + 1
        for layer in self._layers:
            layer.at_B, layer.seen = at_B, seen
        tokens_B1 = torch.tensor([[row.tokens[-1]] for row in self._active], device=device)
        hidden_B1D = self._body(tokens_B1, self._layers, self._masks(at_B, seen), at_B[:, None])
        for row in self._active:
            row.length += 1
        self._take(list(self._active), self._runner.logits(hidden_B1D[:, 0]))

    def _masks(self, at_B: Tensor, seen: int) -> Any:
        """What each row sees: additive [B, 1, 1, S], by kind of layer where the model has several kinds."""
        dtype = self._layers[0].keys.dtype

        def mask(window: int | None) -> Tensor:
            places_S = torch.arange(seen, device=at_B.device)
            visible_BS = places_S <= at_B[:, None]
            if window is not None:
                visible_BS = visible_BS & (places_S > at_B[:, None] - window)
            return torch.zeros(visible_BS.shape, dtype=dtype, device=at_B.device).masked_fill(
                ~visible_BS, torch.finfo(dtype).min
            )[:, None, None]

        windows = set(self._windows)
        if len(windows) == 1:
            return mask(windows.pop())
        (window,) = windows - {None}
        return {"full_attention": mask(None), "sliding_attention": mask(window)}

    def _take(self, rows: Sequence[_Row], logits_BV: Tensor) -> None:
        """Choose the next token of `rows`; the last active row moves into the place of one that has ended."""
        draws_B = torch.stack([row.prompt.draws_T[len(row.tokens)] for row in rows]).to(logits_BV.device)
        for row, token in zip(rows, choose(logits_BV, draws_B, self._sampling).tolist(), strict=True):
            row.tokens.append(token)
        for slot in range(len(self._active) - 1, -1, -1):
            row = self._active[slot]
            if row.tokens[-1] != self._sampling.end and len(row.tokens) < len(row.prompt.draws_T):
                continue
            self._sampled[row.number] = cut_at_end(row.tokens, self._sampling.end)
            last = self._active.pop()
            if last is not row:
                self._active[slot] = last
                for layer in self._layers:
                    layer.keys[slot], layer.values[slot] = (
                        layer.keys[len(self._active)],
                        layer.values[len(self._active)],
                    )

    def _idle_pass(self) -> None:
        """Take part in a pass of the other ranks, which gather the same parameters."""
        self._set_masks([0])
        token_11 = torch.tensor([[self._runner.pad]], device=self._backbone.device)
        self._runner.logits(self._runner.hidden(token_11)[:, 0])

    def _body(self, tokens_BT: Tensor, layers: Sequence[Any], mask: Any, positions_BT: Tensor) -> Tensor:
        """Final hidden states [B, T, D]."""
        cache = DynamicCache()
        cache.layers = list(layers)
        call = partial(
            self._runner.model.base_model, tokens_BT, attention_mask=mask, position_ids=positions_BT,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        hidden: Tensor = self._backbone.enter(lambda: call().last_hidden_state)
        return hidden


def decoder_for(
    runner: BackboneRunner, sampling: Sampling, prompts: Sequence[Prompt], masks_MLI: Tensor | None = None
) -> Decoder:
    """The one for these prompts: behind shared prefixes where that gives exactly the plain model's distribution."""
    longest = max((len(p.suffix) + len(p.draws_T) for p in prompts), default=0)
    shareable = all(runner.can_share([prefix], longest) for prefix in {p.prefix for p in prompts})
    decoder = SlotDecoder if shareable and SlotDecoder.supports(runner) else PaddedDecoder
    return decoder(runner, sampling, masks_MLI)
