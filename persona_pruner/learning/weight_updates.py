"""What is learned beside a backbone's weights and then folded into them: gains, and an update of low rank.

Shapes: L layers, I channels, D width of a module's output, C width of its input, R rank.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from persona_pruner.backbone.channels import find_ffns, forward_hooks
from persona_pruner.learning.encoding import seeded


class Gains:
    """Factors, 1 at first: of every FFN channel, of the gates before their activation, and of the norms' outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.ffns = find_ffns(model)
        layers, channels = len(self.ffns), self.ffns[0].channels
        self.channels_LI = torch.ones(layers, channels)
        gates = [ffn.inputs[0] for ffn in self.ffns if len(ffn.inputs) == 2]
        norms = [module for module in model.modules() if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))]
        self._gates = len(gates)
        self.modules: list[Any] = [*gates, *(norm for norm in norms if getattr(norm, "weight", None) is not None)]
        self.outputs = [torch.ones(len(module.weight), requires_grad=True) for module in self.modules]

    def of_channels(self) -> list[Tensor]:
        return [self.channels_LI, *self.outputs[: self._gates]]

    def of_norms(self) -> list[Tensor]:
        return self.outputs[self._gates :]

    def applied(self) -> AbstractContextManager[None]:
        """Inside, the modules' outputs are multiplied, with a graph to `outputs`; channels are the masks' matter."""

        def hook(gain_D: Tensor) -> Any:
            return lambda module, inputs, output: output * gain_D.to(output.dtype)

        gained = zip(self.modules, self.outputs, strict=True)
        return forward_hooks((module, hook(gain_D)) for module, gain_D in gained)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the gains into the weights, in place."""
        for ffn, gain_I in zip(self.ffns, self.channels_LI, strict=True):
            ffn.output.weight.copy_(ffn.output.weight.float() * gain_I)
        for module, gain_D in zip(self.modules, self.outputs, strict=True):
            scale = gain_D[:, None] if module.weight.ndim == 2 else gain_D
            offset = _weight_offset(module)
            module.weight.copy_((module.weight.float() + offset) * scale - offset)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(module.bias.float() * gain_D)


class LowRank:
    """An update B A of every block matrix (LoRA, arXiv 2106.09685): A [R, C] drawn, B [D, R] zeros at first."""

    def __init__(self, model: nn.Module, rank: int, seed: int) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.matrices: list[nn.Linear] = []
        self.factors: list[tuple[Tensor, Tensor]] = []
        for name, module in model.named_modules():
            if rank and isinstance(module, nn.Linear) and module is not head:
                drawn = torch.randn(rank, module.in_features, generator=seeded("low rank", seed, name))
                down_RC = (drawn / module.in_features**0.5).to(module.weight.device).requires_grad_()
                up_DR = torch.zeros(module.out_features, rank, device=module.weight.device, requires_grad=True)
                self.matrices.append(module)
                self.factors.append((down_RC, up_DR))

    def parameters(self) -> list[Tensor]:
        return [factor for pair in self.factors for factor in pair]

    def applied(self) -> AbstractContextManager[None]:
        """Inside, it is added to the matrices' outputs, with a graph to the factors."""

        def hook(down_RC: Tensor, up_DR: Tensor) -> Any:
            def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output + inputs[0] @ down_RC.T.to(output.dtype) @ up_DR.T.to(output.dtype)

            return add

        updated = zip(self.matrices, self.factors, strict=True)
        return forward_hooks((matrix, hook(*pair)) for matrix, pair in updated)

    @torch.no_grad()
    def fold(self) -> None:
        """Add it to the weights, in place."""
        for matrix, (down_RC, up_DR) in zip(self.matrices, self.factors, strict=True):
            matrix.weight.copy_(matrix.weight.float() + up_DR @ down_RC)


def _weight_offset(module: Any) -> float:
    """What a norm adds to its weights: Gemma's multiply by 1 + weight."""
    if module.weight.ndim == 2:
        return 0.0
    kept = module.weight.clone()
    probe_D = torch.linspace(-1, 1, len(kept), device=kept.device, dtype=kept.dtype)
    module.weight.zero_()
    without_D = module(probe_D)
    module.weight.copy_(kept)
    bias_D = getattr(module, "bias", None)
    return float((without_D - (0 if bias_D is None else bias_D)).abs().max() > 0)
