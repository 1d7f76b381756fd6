"""One decoder layer at a time: rows wait before a layer, all of them, and go on to the next when the caller says so.

Shapes: B rows, T tokens, D model width.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from persona_pruner.backbone.channels import decoder_layers, forward_hooks
from persona_pruner.backbone.forward import BackboneRunner, PrefixCache


@dataclass(frozen=True)
class WaitingRows:
    """Batches of right-padded rows [B, T], behind one prefix; without it the rows are whole prompts."""

    prefix: tuple[int, ...] | None
    batches: tuple[Tensor, ...]


class LayerSteps:
    """Passes of single layers, under the masks that the runner has set. States are hidden states before a layer: of the
    prefix [1, T, D], if there is one, and then of each batch [B, T, D]."""

    def __init__(self, runner: BackboneRunner) -> None:
        self.runner = runner
        self.layers = decoder_layers(runner.model)
        kinds: list[bool] = []
        with torch.no_grad(), forward_hooks([(self.layers[0], lambda *seen: kinds.append(isinstance(seen[2], tuple)))]):
            runner.hidden(torch.zeros(1, 1, dtype=torch.long, device=runner.backbone.device))
        self._tuples = kinds[0]

    @torch.no_grad()
    def begin(self, rows: WaitingRows) -> list[Tensor]:
        """States before the first layer."""
        cache = None if rows.prefix is None else self.runner.prefix([rows.prefix])
        states: list[Tensor] = []

        def see(number: int, hidden: Tensor, *args: Any, **options: Any) -> None:
            if number == 0:
                states.append(hidden)

        with self._replaced(see):
            if rows.prefix is not None:
                self.runner.prefix([rows.prefix])
            self._run_batches(rows, cache)
        return states

    @torch.no_grad()
    def advance(self, number: int, rows: WaitingRows, states: Sequence[Tensor]) -> list[Tensor]:
        """States behind layer `number`, whose input is `states`."""
        waiting, behind = iter(states), []
        plain = self.layers[number].forward

        def run(index: int, hidden: Tensor, *args: Any, **options: Any) -> Any:
            if index != number:
                return None
            output = plain(next(waiting), *args, **options)
            behind.append(output[0] if self._tuples else output)
            return behind[-1]

        with self._replaced(run):
            cache = None
            if rows.prefix is not None:
                recorded = self.runner.prefix([rows.prefix])
                # The model asks its first layer's cache how long the prefix is.
                cache = PrefixCache([recorded.layers[number]] * len(self.layers), recorded.lengths)
            self._run_batches(rows, cache)
        return behind

    def _run_batches(self, rows: WaitingRows, cache: PrefixCache | None) -> None:
        for tokens_BT in rows.batches:
            first = torch.zeros(len(tokens_BT), dtype=torch.long, device=tokens_BT.device)
            self.runner.hidden(tokens_BT, cache, None if cache is None else first)

    @contextlib.contextmanager
    def _replaced(self, run: Callable[..., Tensor | None]) -> Iterator[None]:
        """Inside, layers are run(number, hidden, ...), and hand on their input where that gives none."""

        def forward(number: int) -> Callable[..., Any]:
            def replaced(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
                output = run(number, hidden_states, *args, **options)
                output = hidden_states if output is None else output
                return (output,) if self._tuples else output

            return replaced

        for number, layer in enumerate(self.layers):
            layer.forward = forward(number)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward
