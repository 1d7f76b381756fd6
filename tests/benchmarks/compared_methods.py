"""The arms of methods.py: one backbone, some personas and one ratio, and what each method makes of them.

Masks that a run has made at the ratio are taken from its output; all others are made when they are asked for first.

Shapes: L layers, I channels, D model width.
"""

import contextlib
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rivals import Calibration, block_influence, channel_moments, flap, least_blocks, without_blocks
from torch import Tensor
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.evaluation.baselines import added_biases, taylor
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.evaluation.table import read_conversations
from persona_pruner.learning.batches import MicroBatchConfig, examples_by_prefix
from persona_pruner.learning.budgets import kept_channels
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import encode
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.methods.one_pass import OnePass
from persona_pruner.learning.outcome import LearnedScores
from persona_pruner.learning.persona_tokens import generic_data
from persona_pruner.learning.pooled import global_config, pooled_config, train_pooled
from persona_pruner.learning.recovery import recover
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.learning.training_free import activation_scores
from persona_pruner.masks.format import Mask
from persona_pruner.masks.store import MaskStore
from persona_pruner.masks.weight_mask import WeightMask
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import open_storage

LEARNED = ("ste", "gumbel", "soft_topk")
CHANNELS = ("activation", "fisher", "contrastive", "magnitude", "random")
WEIGHTS = ("wanda", "sparsegpt", "contrastive_wanda", "contrastive_sparse")
RIVALS = (
    "activation, generic",
    "flap, generic",
    "flap, own",
    "llm-pruner, generic",
    "llm-pruner, own",
    "shortgpt, generic",
)
OTHER = "ste, another's"
"""The mask of the persona half the list away."""
POOLED = "pooled"
"""The mask that own masks start from, where the configuration has one."""
GLOBAL = ("global", "global, all steps")
"""One mask of all personas' rows: with the steps of one persona, and with as many as all of them have together."""
TUNED = "ste, recovered"
"""Tuned by LoRA after the mask, as jobs/recover.py does; the rows that are measured here have no part in it."""
SMALLER = ("ste", OTHER, *GLOBAL, POOLED, "gumbel", "soft_topk", *CHANNELS, *RIVALS)
"""Methods after which the model is smaller, without tuning; masks of single weights leave matrices with holes."""
TEXTS = ("answers", "conversations")
Losses = dict[str, float]


def allowed(method: str, config: RunConfig) -> bool:
    if method == TUNED:
        return importlib.util.find_spec("peft") is not None
    if method == POOLED:
        return config.learning.needs_pooled_mask
    return method not in ("gumbel", "soft_topk") or config.learning.optimizer == "adam"


class PooledStart(TrainingCallbacks):
    def __init__(self, pooled: LearnedScores) -> None:
        self.pooled = pooled

    def pooled_scores(self) -> LearnedScores:
        return self.pooled


@dataclasses.dataclass(frozen=True)
class Output:
    """An output of the job: rows, and masks of one ratio that need not be made again."""

    path: Path

    @cached_property
    def masks(self) -> MaskStore | None:
        storage = open_storage(self.path)
        return MaskStore(self.path) if next(iter(storage.list(keys.MASKS)), None) else None

    @cached_property
    def ratio(self) -> float | None:
        return self.masks.load(self.masks.ids()[0]).metadata.ratio if self.masks else None

    def own(self, method: str, ratio: float, data: PersonaData) -> Mask | WeightMask | None:
        """The persona's mask, where it is of this method, ratio and data."""
        if self.masks is None or ratio != self.ratio:
            return None
        try:
            mask = self.masks.load(data.persona_id)
        except NotFoundError:
            return None
        return mask if mask.metadata.method == method and mask.metadata.data_sha256 == data.sha256 else None

    def shared(self, prefix: str, ratio: float) -> Mask | None:
        """The newest mask for all personas below a key."""
        storage = open_storage(self.path)
        stored = sorted(storage.list(prefix), key=lambda item: item.modified)
        masks = [Mask.from_bytes(storage.get(item.key), item.key) for item in stored]
        return next((mask for mask in reversed(masks) if mask.metadata.ratio == ratio), None)

    def pooled_scores(self, ratio: float) -> LearnedScores | None:
        if self.shared(keys.POOLED_MASK, ratio) is None:
            return None
        return LearnedScores.from_bytes(open_storage(self.path).get(keys.POOLED_SCORES), keys.POOLED_SCORES)


class Comparison:
    """One backbone, some personas, one ratio. `statistics`: what does not depend on the ratio, kept between several."""

    def __init__(
        self, backbone: Backbone, config: RunConfig, people: Sequence[PersonaData], output: Output, calibration: int
    ) -> None:
        self.backbone, self.config, self.people, self.output = backbone, config, people, output
        self.calibration = calibration
        self.conversations = read_conversations(config)
        ratio = config.learning.ratio
        assert ratio != "auto"
        self.ratio, self.channels = ratio, backbone.model.config.intermediate_size
        self.kept = kept_channels(self.channels, ratio, config.learning.channel_multiple)
        self.statistics: dict[str, Any] = {}
        self._made: dict[str, Any] = {}

    @property
    def removed(self) -> int:
        """Parameters that a channel mask takes away."""
        config = self.backbone.model.config
        return config.num_hidden_layers * 3 * config.hidden_size * (self.channels - self.kept)

    def losses(self, method: str, data: PersonaData, rows: int) -> Losses:
        """By kind of text."""
        texts = {"answers": data.heldout, "conversations": self.conversations.get(data.persona_id, ())}
        backbone = self.backbone
        with contextlib.ExitStack() as around:
            if method == TUNED:
                backbone, mask_LI = self._recovered(dataclasses.replace(data, heldout=data.heldout[rows:])), None
            else:
                mask_LI = self._switch_on(method, data, around)
            return {
                text: heldout_loss(backbone, self.config, data.description, some[:rows], mask_LI)
                for text, some in texts.items()
                if some
            }

    def _recovered(self, data: PersonaData) -> Backbone:
        mask = self.made("ste", data)
        assert isinstance(mask, Mask)
        merged = self.config.recovery.model_copy(update={"form": "merged"})
        config = self.config.model_copy(update={"recovery": merged})
        done = recover(self.backbone, config, mask, data, "benchmark")
        assert done is not None
        with tempfile.TemporaryDirectory() as directory:
            for name, content in done.files.items():
                (Path(directory) / name).write_bytes(content)
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=self.backbone.model.dtype)
        return dataclasses.replace(self.backbone, model=model.eval().to(self.backbone.device))

    def _switch_on(self, method: str, data: PersonaData, around: contextlib.ExitStack) -> Tensor | None:
        """The mask [L, I] of a method, or None where what it does is on in the model until `around` ends."""
        if method == "unpruned":
            return None
        if method in RIVALS:
            return self._rival(method, data, around)
        if method in GLOBAL:
            return self._once(method, lambda: self._global(method))
        if method == POOLED:
            stored = self.output.shared(keys.POOLED_MASK, self.ratio)
            return stored.keep_LI if stored is not None else self._pooled_start().keep_LI
        if method == OTHER:
            method, data = "ste", self.people[(self.people.index(data) + len(self.people) // 2) % len(self.people)]
        mask = self.made(method, data)
        if isinstance(mask, WeightMask):
            around.enter_context(mask.apply(self.backbone.model, check_backbone=False))
            return None
        return mask.keep_LI

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def made(self, method: str, data: PersonaData) -> Mask | WeightMask:
        if method in WEIGHTS:
            return self._make(method, data)  # too large to keep
        return self._once(f"{method} {data.persona_id}", lambda: self._make(method, data))

    def _make(self, method: str, data: PersonaData) -> Mask | WeightMask:
        if method in LEARNED and (stored := self.output.own(method, self.ratio, data)) is not None:
            return stored
        changes: dict[str, object] = {"method": method}
        if method not in (*LEARNED, "fisher"):
            changes["budget"] = "uniform"  # widths by Fisher would make every method half Fisher
        learning = self.config.learning.model_copy(update=changes)
        config = self.config.model_copy(update={"learning": learning})
        if method in LEARNED:
            callbacks = PooledStart(self._pooled_start()) if learning.needs_pooled_mask else None
            (result,) = MaskTrainer(self.backbone, config).train([data], run_id="benchmark", callbacks=callbacks)
        else:
            (result,) = OnePass(self.backbone, config).train([self._seen(data)], run_id="benchmark")
        assert result.mask is not None, result.message
        return result.mask

    def _seen(self, data: PersonaData) -> PersonaData:
        """What a method without training looks at."""
        opposite = None if data.opposite is None else self._seen(data.opposite)
        return dataclasses.replace(data, train=data.train[: self.calibration], heldout=(), opposite=opposite)

    def _global(self, method: str) -> Tensor:
        if method == "global" and (stored := self.output.shared(keys.GLOBAL_MASKS, self.ratio)) is not None:
            return stored.keep_LI
        config = global_config(self.config, self.ratio)
        times = len(self.people) if method != "global" else 1
        learning = config.learning.model_copy(update={"steps": config.learning.steps * times})
        config = config.model_copy(update={"learning": learning})
        callbacks = PooledStart(self._pooled_start()) if learning.needs_pooled_mask else None
        mask = train_pooled(self.backbone, config, self.people, "benchmark", callbacks).mask
        assert isinstance(mask, Mask)
        return mask.keep_LI

    def _pooled_start(self) -> LearnedScores:
        def learn() -> LearnedScores:
            stored = self.output.pooled_scores(self.ratio)
            if stored is not None:
                return stored
            learned = train_pooled(self.backbone, pooled_config(self.config), self.people, "benchmark").learned
            assert learned is not None
            return learned

        return self._once(POOLED, learn)

    def _rival(self, method: str, data: PersonaData, around: contextlib.ExitStack) -> Tensor | None:
        name, _, text = method.partition(", ")
        key = method if text == "generic" else f"{method} {data.sha256}"
        if key not in self.statistics:
            self.statistics[key] = self._statistics(name, self._generic() if text == "generic" else self._own(data))
        seen = self.statistics[key]
        if name == "flap":
            keep_LI, bias_LD = flap(self.backbone, seen, self.kept)
            around.enter_context(added_biases(self.backbone, bias_LD))
            return keep_LI
        if name == "shortgpt":
            dropped = least_blocks(self.backbone, seen, self.removed)
            around.enter_context(without_blocks(self.backbone, dropped))
            return None
        return topk_mask(seen, self.kept)

    def _statistics(self, name: str, calibration: Calibration) -> Any:
        if name == "flap":
            return channel_moments(calibration)
        if name == "shortgpt":
            return block_influence(calibration)
        ((prefix, examples),) = examples_by_prefix(calibration.encoded)
        settings = MicroBatchConfig.of(self.config, self.backbone.device)
        if name == "llm-pruner":
            return taylor(self.backbone, prefix, examples, settings)
        with BackboneRunner(self.backbone) as runner:
            return activation_scores(runner, prefix, examples, settings)

    def _generic(self) -> Calibration:
        generic = generic_data(self.backbone, self.config)
        generic = dataclasses.replace(generic, train=generic.train[: self.calibration])
        return Calibration(self.backbone, self.config, generic)

    def _own(self, data: PersonaData) -> Calibration:
        encoded = encode(
            self.backbone.tokenizer, self.config.prompt, self._seen(data), self.config.learning.max_row_tokens
        )
        return Calibration(self.backbone, self.config, encoded)
