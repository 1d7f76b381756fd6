"""Every method of both papers, and the structured rivals, side by side at the same number of removed parameters.

    python tests/benchmarks/methods.py [--config manifests/quickstart/run.yaml] [--output runs/quickstart]
        [--personas 8] [--ratios 0.25 0.5] [--methods ste wanda "flap, own" ...] [--rows 32] [--divergence]

Takes the synthesized rows of a run and makes them where they are missing. Losses in nats per token, on held-out answers
and on conversations that the backbone did not write: the mean over personas of what a method adds to the unpruned loss,
with its standard error over personas; the winner among methods that make the model smaller is marked. Results are kept
beside the data (methods.json in the output), so that a rerun goes on where it stopped.

--divergence prints instead how far masks of single weights of two personas lie apart (1 - Jaccard index), over the
attention matrices and over the FFN's.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from rivals import Calibration, added_biases, flap, least_blocks, taylor, without_blocks
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.load import load_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, Row, read_persona_data
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
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.learning.training_free import activation_scores
from persona_pruner.manifest import read_manifest
from persona_pruner.masks.format import Mask
from persona_pruner.masks.weight_mask import WeightMask
from persona_pruner.storage.open import open_storage

ROOT = Path(__file__).parents[2]
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
GLOBAL = ("global", "global, all steps")
"""One mask of all personas' rows: with the steps of one persona, and with as many as all of them have together."""
SMALLER = (*LEARNED, *GLOBAL, *CHANNELS, *RIVALS)
"""Methods after which the model is smaller; the others leave matrices with holes."""
CALIBRATION_ROWS = 64
"""Of generic text, for the methods that look at it; the published codes take 10 to 128 texts."""
TEXTS = ("answers", "conversations")
Losses = dict[str, float]


class PooledStart(TrainingCallbacks):
    def __init__(self, pooled: LearnedScores) -> None:
        self.pooled = pooled

    def pooled_scores(self) -> LearnedScores:
        return self.pooled


class Comparison:
    """One backbone, some personas, one ratio."""

    def __init__(self, backbone: Backbone, config: RunConfig, people: Sequence[PersonaData], rows: int) -> None:
        self.backbone, self.config, self.people, self.rows = backbone, config, people, rows
        self.conversations = read_conversations(config)
        generic = generic_data(backbone, config)
        generic = dataclasses.replace(generic, train=generic.train[:CALIBRATION_ROWS])
        self.generic = Calibration(backbone, config, generic)
        ratio = config.learning.ratio
        assert ratio != "auto"
        self.channels = backbone.model.config.intermediate_size
        self.kept = kept_channels(self.channels, ratio, config.learning.channel_multiple)
        self._generic: dict[str, object] = {}
        self._pooled: LearnedScores | None = None

    @property
    def removed(self) -> int:
        """Parameters that a channel mask takes away."""
        config = self.backbone.model.config
        return config.num_hidden_layers * 3 * config.hidden_size * (self.channels - self.kept)

    def losses(self, method: str, data: PersonaData) -> Losses:
        """By kind of text."""
        with contextlib.ExitStack() as around:
            mask_LI = self._switch_on(method, data, around)
            texts = self._texts(data)
            return {
                text: heldout_loss(self.backbone, self.config, data.description, rows, mask_LI)
                for text, rows in texts.items()
                if rows
            }

    def _texts(self, data: PersonaData) -> Mapping[str, Sequence[Row]]:
        spoken = self.conversations.get(data.persona_id, ())
        return {"answers": data.heldout[: self.rows], "conversations": spoken[: self.rows]}

    def _switch_on(self, method: str, data: PersonaData, around: contextlib.ExitStack) -> Tensor | None:
        """The mask [L, I] of a method, or None where what it does is on in the model until `around` ends."""
        if method == "unpruned":
            return None
        if method in RIVALS:
            return self._rival(method, data, around)
        if method in GLOBAL:
            return self._global(method)
        mask = self.made(method, data)
        if isinstance(mask, WeightMask):
            around.enter_context(mask.apply(self.backbone.model, check_backbone=False))
            return None
        return mask.keep_LI

    def made(self, method: str, data: PersonaData) -> Mask | WeightMask:
        learning = self.config.learning.model_copy(update={"method": method})
        config = self.config.model_copy(update={"learning": learning})
        if method not in LEARNED:
            (result,) = OnePass(self.backbone, config).train([data], run_id="benchmark")
        else:
            callbacks = PooledStart(self._pooled_start()) if learning.needs_pooled_mask else None
            (result,) = MaskTrainer(self.backbone, config).train([data], run_id="benchmark", callbacks=callbacks)
        assert result.mask is not None, result.message
        return result.mask

    def _global(self, method: str) -> Tensor:
        if method not in self._generic:
            ratio = self.config.learning.ratio
            assert ratio != "auto"
            config = global_config(self.config, ratio)
            times = len(self.people) if method != "global" else 1
            learning = config.learning.model_copy(update={"steps": config.learning.steps * times})
            config = config.model_copy(update={"learning": learning})
            callbacks = PooledStart(self._pooled_start()) if learning.needs_pooled_mask else None
            mask = train_pooled(self.backbone, config, self.people, "benchmark", callbacks).mask
            assert isinstance(mask, Mask)
            self._generic[method] = mask.keep_LI
        return self._generic[method]  # type: ignore[return-value]

    def _pooled_start(self) -> LearnedScores:
        if self._pooled is None:
            self._pooled = train_pooled(self.backbone, pooled_config(self.config), self.people, "benchmark").learned
        assert self._pooled is not None
        return self._pooled

    def _rival(self, method: str, data: PersonaData, around: contextlib.ExitStack) -> Tensor | None:
        name, _, text = method.partition(", ")
        calibration = self.generic if text == "generic" else self._own(data)
        key = method if text == "generic" else f"{method} {data.persona_id}"
        if key not in self._generic:
            self._generic[key] = self._calibrated(name, calibration)
        made = self._generic[key]
        if name == "flap":
            keep_LI, bias_LD = made  # type: ignore[misc]
            around.enter_context(added_biases(self.backbone, bias_LD))
            return keep_LI
        if name == "shortgpt":
            around.enter_context(without_blocks(self.backbone, made))  # type: ignore[arg-type]
            return None
        return made  # type: ignore[return-value]

    def _calibrated(self, name: str, calibration: Calibration) -> object:
        if name == "flap":
            return flap(calibration, self.kept)
        if name == "llm-pruner":
            return taylor(calibration, self.kept)
        if name == "shortgpt":
            dropped = least_blocks(calibration, self.removed)
            print(f"shortgpt drops blocks {dropped} of {self.backbone.model.config.num_hidden_layers}", flush=True)
            return dropped
        ((prefix, examples),) = examples_by_prefix(calibration.encoded)
        with BackboneRunner(self.backbone) as runner:
            settings = MicroBatchConfig.of(self.config, self.backbone.device)
            return topk_mask(activation_scores(runner, prefix, examples, settings), self.kept)

    def _own(self, data: PersonaData) -> Calibration:
        encoded = encode(self.backbone.tokenizer, self.config.prompt, data, self.config.learning.max_row_tokens)
        return Calibration(self.backbone, self.config, encoded)


def read_people(options: argparse.Namespace, config: RunConfig) -> list[PersonaData]:
    """The personas' synthesized rows, each with the next one as its opposite."""
    manifest = read_manifest(str(options.manifest or options.config.parent / "personas.jsonl"))
    personas, storage = manifest.personas[: options.personas], open_storage(options.output)
    if not all(storage.exists(f"synthesis/personas/{persona.id}/data.parquet") for persona in personas):
        words = [
            "jobs/synthesize.py",
            manifest.source,
            "--config",
            str(options.config),
            "--output",
            str(options.output),
        ]
        subprocess.run([sys.executable, *words, "--limit", str(options.personas)], cwd=ROOT, check=True)
    people = [read_persona_data(storage, persona, unfinished=True) for persona in personas]
    return [dataclasses.replace(own, opposite=people[(number + 1) % len(people)]) for number, own in enumerate(people)]


def table(results: Mapping[str, Mapping[str, Losses]], methods: Sequence[str], ratio: float) -> dict[str, object]:
    """Print what each method adds to the unpruned loss; `results` by method and persona."""
    summary: dict[str, object] = {}
    print(f"\nratio {ratio}: nats per token above the unpruned model, mean and standard error over personas")
    print(f"{'method':<22}{'answers':>18}{'conversations':>18}")
    added = {
        (method, text): [
            losses[text] - results["unpruned"][persona][text]
            for persona, losses in results[method].items()
            if text in losses
        ]
        for method in methods
        for text in TEXTS
    }
    best = {
        text: min((m for m in methods if m in SMALLER), key=lambda m, text=text: statistics.mean(added[m, text]))
        for text in TEXTS
    }
    for method in methods:
        cells = []
        for text in TEXTS:
            values = added[method, text]
            mean = statistics.mean(values)
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
            mark = " <" if best[text] == method else "  "
            cells.append(f"{mean:>8.3f} ± {error:.3f}{mark}")
            summary[f"{method} / {text}"] = [round(mean, 4), round(error, 4)]
        holes = "" if method in SMALLER else "   (weights: nothing gets smaller)"
        print(f"{method:<22}{cells[0]:>18}{cells[1]:>18}{holes}")
    return {"best": best, **summary}


def divergence(comparison: Comparison, methods: Sequence[str]) -> dict[str, list[float]]:
    """Mean over pairs of personas of 1 - Jaccard index, over attention and FFN matrices."""
    apart: dict[str, list[float]] = {}
    for method in methods:
        masks = [comparison.made(method, data) for data in comparison.people]
        pairs = [
            [1 - one.similarity(other, part) for part in ("attn", "mlp")]
            for one, other in combinations(masks, 2)
            if isinstance(one, WeightMask) and isinstance(other, WeightMask)
        ]
        apart[method] = [round(statistics.mean(values), 4) for values in zip(*pairs, strict=True)]
        print(f"{method:<22} attention {apart[method][0]:.3f}   FFN {apart[method][1]:.3f}", flush=True)
    return apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "manifests/quickstart/run.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--personas", type=int, default=8)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", default=[*SMALLER, *WEIGHTS])
    parser.add_argument("--rows", type=int, default=32, help="held-out rows per persona and kind of text")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--divergence", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(options.config, options.settings)
    people = read_people(options, config)
    backbone = load_backbone(config.backbone, deepspeed=False)
    file = options.output / "methods.json"
    kept: dict[str, Losses] = json.loads(file.read_text()) if file.exists() else {}
    summary = {}
    for ratio in options.ratios:
        learning = config.learning.model_copy(update={"ratio": ratio})
        comparison = Comparison(backbone, config.model_copy(update={"learning": learning}), people, options.rows)
        if options.divergence:
            summary[str(ratio)] = divergence(comparison, [method for method in options.methods if method in WEIGHTS])
            continue
        results: dict[str, dict[str, Losses]] = {}
        for method in ("unpruned", *options.methods):
            for data in people:
                key = f"{ratio} {method} {data.persona_id} {data.sha256[:12]} {options.rows} {options.settings}"
                if key not in kept:
                    kept[key] = comparison.losses(method, data)
                    file.write_text(json.dumps(kept))
                results.setdefault(method, {})[data.persona_id] = kept[key]
            print(f"ratio {ratio}: {method} done", flush=True)
        summary[str(ratio)] = table(results, options.methods, ratio)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
