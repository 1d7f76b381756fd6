"""FFN channels of a transformers model: where they are, and masks multiplied into them.

Shapes: L layers, I channels of a layer, B rows, T tokens.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from persona_pruner.errors import BackboneError, MaskError

# Output projection of an FFN -> the linears whose output rows are the same channels. Llama, Mistral, Qwen2/3, Gemma;
# Phi-3 (gate and up in one matrix); Apertus, Nemotron (no gate); GPT-NeoX, BLOOM, Falcon; OPT, Phi.
_FFNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("down_proj", ("gate_proj", "up_proj")),
    ("down_proj", ("gate_up_proj",)),
    ("down_proj", ("up_proj",)),
    ("dense_4h_to_h", ("dense_h_to_4h",)),
    ("fc2", ("fc1",)),
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Ffn:
    """One layer's FFN. `output` [D, I] reads the channels, `inputs` (each [I, D], or one [2I, D]) write them."""

    name: str
    output: nn.Linear
    inputs: tuple[nn.Linear, ...]

    @property
    def channels(self) -> int:
        return self.output.in_features

    @property
    def fused(self) -> bool:
        return self.inputs[0].out_features == 2 * self.channels


def find_ffns(model: nn.Module) -> list[Ffn]:
    """The FFN of every layer, in layer order. Raises BackboneError where a layer has no plain FFN of its own."""
    ffns = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for output, inputs in _FFNS:
            linears = [children.get(child) for child in (output, *inputs)]
            if all(isinstance(linear, nn.Linear) for linear in linears):
                ffns.append(Ffn(f"{name}.{output}", linears[0], tuple(linears[1:])))  # type: ignore[arg-type]
                break
    config: Any = model.config
    layers = getattr(config, "num_hidden_layers", None)
    if not ffns or len(ffns) != layers or any(getattr(config, name, None) for name in _EXPERTS):
        known = " or ".join(f"{'/'.join(inputs)} + {output}" for output, inputs in _FFNS)
        raise BackboneError(
            f"{type(model).__name__}: has {len(ffns)} known feed-forward blocks in {layers} layers; known are {known} "
            "(nn.Linear), one in each layer; mixtures of experts and other layouts cannot be masked"
        )
    return ffns


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformers model, in their order."""
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)  # type: ignore[arg-type]


class ChannelMasks:
    """Multiplies masks into the channels of a model while attached. A context manager; entering attaches."""

    def __init__(self, model: nn.Module) -> None:
        self.ffns = find_ffns(model)
        widths = sorted({ffn.channels for ffn in self.ffns})
        if len(widths) > 1:
            raise BackboneError(
                f"{type(model).__name__}: layers differ in FFN channels ({widths}); "
                "a backbone that can be masked has the same number in each"
            )
        self.active: Sequence[Tensor] | None = None
        self._hooks: list[Any] = []

    @property
    def layers(self) -> int:
        return len(self.ffns)

    @property
    def channels(self) -> int:
        return self.ffns[0].channels

    def attach(self) -> "ChannelMasks":
        if not self._hooks:
            self._hooks = [
                ffn.output.register_forward_pre_hook(self._hook(layer)) for layer, ffn in enumerate(self.ffns)
            ]
        return self

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.active = None

    def __enter__(self) -> "ChannelMasks":
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def set(self, mask: Tensor | None) -> None:
        """Use mask [L, I] for all rows, or [B, L, I] with one mask per row (floating, may require grad), or none."""
        if mask is None:
            self.active = None
            return
        assert mask.shape[-2:] == (self.layers, self.channels), (tuple(mask.shape), self.layers, self.channels)
        self.active = mask.unbind(-2)

    def _hook(self, layer: int) -> Any:
        def multiply(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.active is None:
                return None
            hidden, *rest = inputs
            mask = self.active[layer].to(hidden.device, hidden.dtype)
            if mask.ndim == 1:
                return (hidden * mask, *rest)
            rows = hidden.shape[0] if hidden.ndim > 2 else len(mask)
            if rows != len(mask) or len(hidden) % len(mask):
                raise MaskError(
                    f"{len(mask)} masks are on, one per row, and the batch has {rows} rows; give one per row"
                )
            by_row = hidden.view(mask.shape[0], -1, hidden.shape[-1])
            return ((by_row * mask[:, None]).view(hidden.shape), *rest)

        return multiply


def record_channels(model: nn.Module, see: Callable[[int, Tensor], None]) -> contextlib.AbstractContextManager[None]:
    """Inside, see(layer, hidden [..., I]) is called before every output projection."""

    def hook(layer: int) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with torch.no_grad():
                see(layer, inputs[0])

        return look

    return forward_pre_hooks((ffn.output, hook(layer)) for layer, ffn in enumerate(find_ffns(model)))


def forward_hooks(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]],
) -> contextlib.AbstractContextManager[None]:
    """Inside, each module's output passes through its hook(module, inputs, output)."""
    return _removed_at_the_end(module.register_forward_hook(hook) for module, hook in hooks)


def forward_pre_hooks(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]],
) -> contextlib.AbstractContextManager[None]:
    """Inside, each module's inputs pass through its hook(module, inputs)."""
    return _removed_at_the_end(module.register_forward_pre_hook(hook) for module, hook in hooks)


@contextlib.contextmanager
def _removed_at_the_end(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """`handles` registers its hooks as it is iterated."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
