"""One mended backbone for all masks of a run: refitted FFN outputs, gains of channels and norms, and an update of low
rank, that make up for what masks take away.

Masks stay what they are, a few kilobytes each. What they cost is partly the same for all of them, and that part is
learned once, under the personas' own masks and on their rows, and folded into the weights: the result is a checkpoint
of the same architecture which takes the place of the backbone wherever its masks are used.

Shapes: P personas of a step, L layers, I channels, D width of a module's output, C width of its input, R rank.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persona_pruner.backbone.channels import find_ffns, forward_hooks
from persona_pruner.backbone.files import RECOVERED
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, read_generic_rows
from persona_pruner.errors import BackboneError
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample
from persona_pruner.learning.encoding import batch, encode, seeded
from persona_pruner.learning.objective import mask_gradient
from persona_pruner.learning.persona_tokens import with_foreign_rows
from persona_pruner.learning.refit import MaskedRows, refit_outputs
from persona_pruner.learning.teacher import TeacherCache

PERSONAS_PER_STEP = 2
LOW_RANK_RATE = 0.2
"""Rate of the update of low rank as a part of the gains'."""
WARM_UP_STEPS = 5
NORM_RATE = 0.5
"""Rate of the norms' gains, which all channels of a block feel, as a part of the others'."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a backbone is mended. With `rank` 0 only gains are learned, with `refit_rows` 0 nothing is refitted."""

    steps: int = 60
    rate: float = 0.01
    """Adam's for the gains."""
    rank: int = 16
    """Of the matrices' update."""
    refit_rows: int = 1536
    """Rows of all personas together on which the FFN outputs are refitted."""
    foreign: float = 0.5
    """Share of the rows that the personas did not write."""
    personas: int = 16
    """Under how many masks."""


@dataclass(frozen=True)
class Masked:
    """A persona's rows and its mask, bool [L, I]."""

    data: PersonaData
    keep_LI: Tensor


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


def recover(
    backbone: Backbone,
    config: RunConfig,
    masked: Sequence[Masked],
    recovery: Recovery,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[float]:
    """Mend `backbone`, in place. Yields every step's loss, nats per token.

    1. Refit the FFN output matrices in closed form, on `refit_rows` of the rows.
    2. Learn gains, and with a `rank` an update of the matrices: Adam at `rate`, going down to 0 linearly; a step has
       the usual number of rows, of two personas under their masks. The loss is KL(unpruned || masked).
    3. Fold both into the weights.

    `say` is told the layers that are refitted. Raises BackboneError for a sharded backbone, PersonaError for rows that
    cannot be used.
    """
    if backbone.sharded:
        raise BackboneError("recovery needs the whole backbone in one process: groups.shards = 1")
    config = _distilling(config, recovery.foreign)
    settings, learning, steps = MicroBatchConfig.of(config, backbone.device), config.learning, recovery.steps
    rows = _Rows(backbone, config, masked)
    gains, low_rank = Gains(backbone.model), LowRank(backbone.model, recovery.rank, learning.seed)
    teacher = TeacherCache(learning.objective.top_logits, learning.objective.head_tokens)
    groups = [
        {"params": gains.of_channels(), "factor": 1.0},
        {"params": gains.of_norms(), "factor": NORM_RATE},
        {"params": low_rank.parameters(), "factor": LOW_RANK_RATE},
    ]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], lr=recovery.rate, betas=(0.9, 0.95), eps=1e-12)
    with BackboneRunner(backbone) as runner:
        for number, visited in rows.visited(steps).items():
            teacher.collect_rows(runner, rows.encoded[number], settings, visited)
        if recovery.refit_rows:
            for layer, (before, after) in enumerate(refit_outputs(runner, rows.masked(recovery.refit_rows), settings)):
                say(f"layer {layer}: {before:.1%} of its hidden states' squares missing, {after:.1%} when refitted")
        for step in range(steps):
            now = recovery.rate * min((step + 1) / WARM_UP_STEPS, 1) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = now * group["factor"]
            optimizer.zero_grad()
            chosen = list(rows.of_step(step))
            keep_PLI = torch.stack([masked[number].keep_LI for number in chosen]).to(backbone.device).float()
            prefixes = [rows.encoded[number].prefixes[0] for number in chosen]
            with low_rank.applied(), gains.applied():
                grad_PLI, loss = mask_gradient(
                    runner, keep_PLI * gains.channels_LI, prefixes, rows.examples(step), settings, teacher
                )
            gains.channels_LI.grad = (grad_PLI * keep_PLI).sum(0)
            optimizer.step()
            yield float(loss.total.sum())
    low_rank.fold()
    gains.fold()


def _distilling(config: RunConfig, foreign: float) -> RunConfig:
    """The run's configuration, whatever its masks learned from, with what a mended backbone learns from."""
    learned = {"cross_entropy": 0.0, "distillation": 1.0, "foreign": foreign}
    objective = config.learning.objective.model_copy(update=learned)
    return config.model_copy(update={"learning": config.learning.model_copy(update={"objective": objective})})


def save_recovered(backbone: Backbone, to: Path) -> None:
    """Write the checkpoint; what was made for the backbone that it comes from is taken to be made for it too.

    Raises BackboneError where `to` is in use; nothing is left in `to` where writing fails.
    """
    check_free(to)
    partial = to.with_name(f".{to.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model: Any = backbone.model
        model.save_pretrained(partial)
        backbone.tokenizer.save_pretrained(partial)
        (partial / RECOVERED).write_text(json.dumps({"fingerprint": backbone.fingerprint}), encoding="utf-8")
        if to.exists():
            to.rmdir()
        partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(to: Path) -> None:
    if to.exists() and any(to.iterdir()):
        raise BackboneError(f"{to}: not empty; give a directory that does not exist yet")


class _Rows:
    """The rows of all personas, and which of them a step has: some of two personas."""

    def __init__(self, backbone: Backbone, config: RunConfig, masked: Sequence[Masked]) -> None:
        self.learning, objective = config.learning, config.learning.objective
        foreign = read_generic_rows(objective.generic_rows) if objective.foreign else ()
        self.keeps = [each.keep_LI for each in masked]
        data = [with_foreign_rows(each.data, foreign, self.learning) for each in masked]
        limit = self.learning.max_row_tokens
        self.encoded = [encode(backbone.tokenizer, config.prompt, each, limit) for each in data]

    def of_step(self, step: int) -> dict[int, list[int]]:
        """Numbers of rows by number of the persona."""
        personas = min(PERSONAS_PER_STEP, len(self.encoded))
        share, first = max(self.learning.rows_per_step // personas, 1), step * personas
        chosen = [(first + n) % len(self.encoded) for n in range(personas)]
        visit, seed = first // len(self.encoded), self.learning.seed
        return {
            number: batch(len(self.encoded[number].train), share, visit, seed, self.encoded[number].sha256)
            for number in chosen
        }

    def masked(self, count: int) -> list[MaskedRows]:
        """So many rows of all personas together, the first ones of their order."""
        share, every = max(count // len(self.encoded), 1), []
        for own, keep_LI in zip(self.encoded, self.keeps, strict=True):
            numbers = batch(len(own.train), share, 0, self.learning.seed, own.sha256)
            every.append(MaskedRows(own.prefixes[0], [own.train[n] for n in numbers], keep_LI))
        return every

    def visited(self, steps: int) -> dict[int, set[int]]:
        every: dict[int, set[int]] = {}
        for step in range(steps):
            for number, rows in self.of_step(step).items():
                every.setdefault(number, set()).update(rows)
        return every

    def examples(self, step: int) -> list[TrainingExample]:
        """In slots by persona; the loss is the mean over the personas of the means over their answer tokens."""
        examples = []
        chosen = self.of_step(step)
        for slot, (number, rows) in enumerate(chosen.items()):
            own = self.encoded[number]
            tokens = sum(own.train[n].answer for n in rows) * len(chosen)
            examples += [TrainingExample(slot, (own.persona_id, n), own.train[n], 1 / tokens) for n in rows]
        return examples


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
