"""One mask in training: scores, moments of its gradient, how far it is. Everything that a checkpoint must hold.

Shapes: L layers, I channels.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from persona_pruner.config.schema import LearningConfig
from persona_pruner.errors import PersonaError
from persona_pruner.learning.budgets import free_widths, kept_channels
from persona_pruner.learning.encoding import seeded
from persona_pruner.learning.estimators import relaxed_mask, topk_mask, with_core
from persona_pruner.learning.stoppers import Stopper
from persona_pruner.masks.header import metadata_of

logger = logging.getLogger(__name__)
POOLED_VALUE_STEP = 20
"""Where the steps of the value optimizer's averaging begin for a persona that starts at the pooled mask."""


@dataclass(eq=False)
class MaskCandidate:
    """`scores_LI` float32. `rung` counts the ratios that `auto` has tried."""

    config: LearningConfig
    persona_id: str
    scores_LI: Tensor
    channels: int
    ratio: float
    learning_rate: float
    name: str = ""
    widths_L: Tensor | None = None
    """Channels per layer (int64) where the budget is not uniform; they stay as they are at the start."""
    core_LI: Tensor | None = None
    """Channels that are kept whatever is learned (bool); only the scores of the others are."""
    steps: int = 0
    """Step budget; 0 takes that of the configuration."""
    fisher_LI: Tensor | None = None
    """What the value optimizer expects of each channel, nats per token."""
    step: int = 0
    rung: int = 0
    seconds: float = 0.0
    tokens: int = 0
    heldout: float | None = None
    losses: list[float] = field(default_factory=list)
    """Training loss of every step so far, those of earlier ratios of `auto` too."""
    heldout_losses: list[tuple[int, float]] = field(default_factory=list)
    """(steps so far, held-out loss), where it was measured."""
    mean_LI: Tensor | None = None
    """Mean of the scores over the steps of the tail so far."""
    averaged: int = 0
    accepted_LI: Tensor | None = None
    """Scores of the last ratio that `auto` found good enough."""
    first_LI: Tensor = field(init=False, repr=False)
    second_L1: Tensor = field(init=False, repr=False)
    stopper: Stopper = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.steps = self.steps or self.config.steps
        self.reset()

    def reset(self) -> None:
        """From step 0 with these scores."""
        self.step, self.heldout, self.mean_LI, self.averaged = 0, None, None, 0
        self.first_LI = torch.zeros_like(self.scores_LI)
        self.second_L1 = torch.zeros_like(self.scores_LI[:, :1])
        self.stopper = Stopper(self.config.stoppers)

    def widths(self, scores_LI: Tensor) -> Tensor:
        """Channels that each layer keeps under such scores, int64 [L]."""
        if self.widths_L is not None:
            return self.widths_L
        layers, multiple = len(scores_LI), self.config.channel_multiple
        kept = kept_channels(self.channels, self.ratio, multiple)
        if self.config.budget == "free" and self.config.optimizer == "value":
            return free_widths(scores_LI, layers * kept, multiple)
        return torch.full((layers,), kept, device=scores_LI.device)

    def learned(self) -> Tensor:
        """The scores that the mask is made of: averaged over the tail of the training (Polyak), once it is reached."""
        return self.scores_LI if self.mean_LI is None else self.mean_LI

    def mask(self) -> Tensor:
        """The hard mask, bool [L, I]."""
        return self._hard_mask(self.learned())

    def _hard_mask(self, scores_LI: Tensor) -> Tensor:
        ordered_LI = with_core(scores_LI, self.core_LI)
        return topk_mask(ordered_LI, self.widths(ordered_LI))

    def training_mask(self) -> tuple[Tensor, Tensor]:
        """The mask of this step, float32 with a graph to the scores, and those scores (a leaf)."""
        leaf = self.scores_LI.detach().requires_grad_()
        noise = seeded("noise", self.config.seed, self.persona_id, self.step)
        config = self.config
        widths_L = self.widths(with_core(self.scores_LI, self.core_LI))
        return relaxed_mask(leaf, widths_L, config.method, config.temperature, noise, self.core_LI), leaf

    def update(self, grad_LI: Tensor) -> None:
        """One step of the optimizer, and the mean of the scores.

        Raises PersonaError (not_finite) and leaves everything as it was where gradient or scores are not finite.
        """
        if not (torch.isfinite(grad_LI).all() and torch.isfinite(self.scores_LI).all()):
            raise PersonaError("not_finite", f"{self.persona_id}: loss or scores not finite at step {self.step}")
        if self.core_LI is not None:
            grad_LI = grad_LI.masked_fill(self.core_LI, 0)
        if self.config.optimizer == "value":
            self._follow_values(grad_LI)
        else:
            self._adam(grad_LI)
        self.step += 1
        if self.step > (1 - self.config.average) * self.steps:
            self.averaged += 1
            mean_LI = self.scores_LI if self.mean_LI is None else self.mean_LI
            self.mean_LI = mean_LI + (self.scores_LI - mean_LI) / self.averaged

    def _follow_values(self, grad_LI: Tensor) -> None:
        """Each score moves towards what its channel is worth: half of F, and what the gradient says beyond F.

        F / 2 is what removing a channel costs to second order, so that a channel that is kept is expected to have
        gradient 0 and one that is not to have -F. A single step's gradient is mostly noise at the threshold: hence its
        small weight, and the mean over ever more steps. Nothing is normalised: no heavy-tailed channel decides for the
        others.
        """
        assert self.fisher_LI is not None
        removed_LI = (~self._hard_mask(self.scores_LI)).float()
        surprise_LI = -grad_LI - self.fisher_LI * removed_LI
        value_LI = self.fisher_LI / 2 + self.config.value_gradient * surprise_LI
        averaged_over = 10 + (self.step + (POOLED_VALUE_STEP if self.config.init == "pooled" else 0)) / 2
        moved_LI = self.scores_LI + (value_LI - self.scores_LI) / averaged_over
        self.scores_LI = moved_LI if self.core_LI is None else torch.where(self.core_LI, self.scores_LI, moved_LI)

    def _adam(self, grad_LI: Tensor) -> None:
        """Adam on the clipped gradient with one second moment per layer, as Adam-mini (arXiv 2406.16793).

        A second moment of each channel would give channels that do not matter steps as long as those that do, and
        noise decides at the threshold. Betas 0.9 and 0.99.
        """
        norm = grad_LI.norm()
        grad_LI = grad_LI * (self.config.grad_clip / norm.clamp_min(self.config.grad_clip))
        count = self.step + 1
        self.first_LI.lerp_(grad_LI, 0.1)
        self.second_L1.lerp_(self._mean_square(grad_LI), 0.01)
        scale_L1 = (self.second_L1 / (1 - 0.99**count)).sqrt_().add_(1e-12)
        self.scores_LI = self.scores_LI - self._rate() / (1 - 0.9**count) * self.first_LI / scale_L1

    def _mean_square(self, grad_LI: Tensor) -> Tensor:
        """[L, 1], over the channels that are learned."""
        if self.core_LI is None:
            return grad_LI.square().mean(1, keepdim=True)
        learned_L1 = (~self.core_LI).sum(1, keepdim=True).clamp_min(1)
        return grad_LI.square().sum(1, keepdim=True) / learned_L1

    def _rate(self) -> float:
        done = self.step / self.steps
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * factor[self.config.schedule]


_MADE_WITH = ("persona_id", "channels", "ratio", "learning_rate", "name", "steps")
_TENSORS = ("scores", "widths", "core", "fisher", "first", "second", "mean", "accepted", "last")
_PROGRESS = ("step", "rung", "seconds", "tokens", "heldout", "averaged", "losses", "heldout_losses")


def to_bytes(candidates: Sequence[MaskCandidate], data_sha256: str) -> bytes:
    """A checkpoint of all candidates of one persona (safetensors)."""
    tensors: dict[str, Tensor] = {}
    values = []
    for index, candidate in enumerate(candidates):
        stopper = candidate.stopper
        own = {
            "scores": candidate.scores_LI,
            "widths": candidate.widths_L,
            "core": candidate.core_LI,
            "fisher": candidate.fisher_LI,
            "first": candidate.first_LI,
            "second": candidate.second_L1,
            "mean": candidate.mean_LI,
            "accepted": candidate.accepted_LI,
            "last": stopper.last_LI,
        }
        tensors |= {f"{index}.{name}": tensor.cpu().clone() for name, tensor in own.items() if tensor is not None}
        numbers = {name: getattr(candidate, name) for name in (*_MADE_WITH, *_PROGRESS)}
        values.append(numbers | {"best": stopper.best, "stale": stopper.stale})
    return save(tensors, {"candidates": json.dumps(values), "data_sha256": data_sha256})


def from_bytes(
    data: bytes, config: LearningConfig, data_sha256: str, device: torch.device
) -> list[MaskCandidate] | None:
    """The candidates of a checkpoint, exactly as they were; None where it was made from other data or is unreadable."""
    try:
        header = metadata_of(data)
        if header["data_sha256"] != data_sha256:
            return None
        tensors = {name: tensor.to(device) for name, tensor in load(data).items()}
        return [
            _restored(config, values, {name: tensors.get(f"{index}.{name}") for name in _TENSORS})
            for index, values in enumerate(json.loads(header["candidates"]))
        ]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("a checkpoint cannot be read (%s: %s); its persona starts anew", type(error).__name__, error)
        return None


def _restored(config: LearningConfig, values: dict[str, Any], tensors: dict[str, Tensor | None]) -> MaskCandidate:
    scores_LI, first_LI, second_L1 = tensors["scores"], tensors["first"], tensors["second"]
    if scores_LI is None or first_LI is None or second_L1 is None:
        raise KeyError("scores, first or second")
    candidate = MaskCandidate(config=config, scores_LI=scores_LI, **{name: values[name] for name in _MADE_WITH})
    for name in _PROGRESS:
        setattr(candidate, name, values[name])
    candidate.first_LI, candidate.second_L1 = first_LI, second_L1
    candidate.widths_L, candidate.core_LI, candidate.fisher_LI = tensors["widths"], tensors["core"], tensors["fisher"]
    candidate.mean_LI, candidate.accepted_LI = tensors["mean"], tensors["accepted"]
    candidate.stopper.best, candidate.stopper.stale = values["best"], values["stale"]
    candidate.stopper.last_LI = tensors["last"]
    return candidate
