"""Every method of both papers, and the structured rivals, side by side at the same number of removed parameters.

    python tests/benchmarks/methods.py [--config manifests/quickstart/run.yaml] [--output runs/quickstart ...]
        [--personas 8] [--ratios 0.25 0.5] [--methods ste wanda "flap, own" ...] [--rows 32] [--divergence]

Takes the synthesized rows of a run and makes them where they are missing. Masks that the run has learned at a ratio
(own, pooled, of the comparison) are taken from there; all others are made here. Of several outputs, each ratio takes
the one whose masks have it, else the first.

Losses in nats per token, on held-out answers and on conversations that the backbone did not write: the mean over
personas of what a method adds to the unpruned loss, with its standard error over personas; the winner among methods
that make the model smaller is marked. Methods without training look at --calibration rows, generic or the persona's.
Results are kept beside the data (methods.json in the output), so that a rerun goes on where it stopped.

--divergence prints instead how far masks of single weights of two personas lie apart (1 - Jaccard index), over the
attention matrices and over the FFN's. --seeds prints how the similarities of own masks (of all pairs of personas)
correlate with those of masks of another seed, and with the similarity of the descriptions (words; mean final hidden
state of the backbone, less the mean over personas).
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rivals import (
    Calibration,
    block_influence,
    channel_moments,
    flap,
    least_blocks,
    without_blocks,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.load import load_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, read_persona_data
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
from persona_pruner.manifest import read_manifest
from persona_pruner.masks.format import Mask
from persona_pruner.masks.store import MaskStore
from persona_pruner.masks.weight_mask import WeightMask
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError
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


def read_people(options: argparse.Namespace, output: Path) -> list[PersonaData]:
    """The personas' synthesized rows, each with the next one as its opposite."""
    manifest = read_manifest(str(options.manifest or options.config.parent / "personas.jsonl"))
    personas, storage = manifest.personas[: options.personas], open_storage(output)
    if not all(storage.exists(keys.persona_data(persona.id)) for persona in personas):
        words = ["jobs/synthesize.py", manifest.source, "--config", str(options.config), "--output", str(output)]
        words += ["--limit", str(options.personas)]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    people = [read_persona_data(storage, persona, unfinished=True) for persona in personas]
    return [dataclasses.replace(own, opposite=people[(number + 1) % len(people)]) for number, own in enumerate(people)]


def table(results: Mapping[str, Mapping[str, Losses]], methods: Sequence[str], ratio: float) -> dict[str, object]:
    """Print what each method adds to the unpruned loss; `results` by method and persona."""
    summary: dict[str, object] = {}
    added = {
        (method, text): [
            losses[text] - results["unpruned"][persona][text]
            for persona, losses in results[method].items()
            if text in losses
        ]
        for method in methods
        for text in TEXTS
    }
    unpruned = {
        text: statistics.mean(own[text] for own in results["unpruned"].values() if text in own) for text in TEXTS
    }
    ranked = {
        text: sorted((m for m in methods if m in SMALLER), key=lambda m, text=text: statistics.mean(added[m, text]))
        for text in TEXTS
    }
    print(
        f"\nratio {ratio}: nats per token above the unpruned model ({unpruned['answers']:.3f} on answers, "
        f"{unpruned['conversations']:.3f} on conversations), mean and standard error over "
        f"{len(results['unpruned'])} personas"
    )
    print(f"{'method':<22}{'answers':>18}{'conversations':>18}")
    for method in methods:
        cells = []
        for text in TEXTS:
            mean, error = mean_error(added[method, text])
            mark = " <" if ranked[text][:1] == [method] else "  "
            cells.append(f"{mean:>8.3f} ± {error:.3f}{mark}")
            summary[f"{method} / {text}"] = [round(mean, 4), round(error, 4)]
        holes = "   (weights: nothing gets smaller)" if method in WEIGHTS else ""
        print(f"{method:<22}{cells[0]:>18}{cells[1]:>18}{holes}")
    for text, (best, *others) in ranked.items():
        if others:
            pairs = zip(added[others[0], text], added[best, text], strict=True)
            mean, error = mean_error([second - first for second, first in pairs])
            print(f"{text}: {best} before {others[0]} by {mean:.3f} ± {error:.3f}, paired over personas")
    return {"best": {text: order[0] for text, order in ranked.items()}, **summary}


def mean_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, NaN of one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


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


def agreement(comparison: Comparison) -> dict[str, float]:
    """Correlations over all pairs of personas with the similarity of their own masks."""
    people, config = comparison.people, comparison.config
    learning = config.learning.model_copy(update={"seed": config.learning.seed + 1})
    config = config.model_copy(update={"learning": learning})
    reseeded = Comparison(comparison.backbone, config, people, Output(Path("none")), comparison.calibration)
    pairs = list(combinations(range(len(people)), 2))

    def similarities(masks: Sequence[Any]) -> Tensor:
        return torch.tensor([masks[a].similarity(masks[b]) for a, b in pairs])

    first, second = (similarities([each.made("ste", data) for data in people]) for each in (comparison, reseeded))
    words = [set(data.description.lower().split()) for data in people]
    shared = torch.tensor([len(words[a] & words[b]) / len(words[a] | words[b]) for a, b in pairs])
    states_PD = torch.stack([_description(comparison.backbone, data.description) for data in people])
    states_PD = torch.nn.functional.normalize(states_PD - states_PD.mean(0))
    meant = torch.tensor([float(states_PD[a] @ states_PD[b]) for a, b in pairs])
    others = {"another seed": second, "descriptions, words": shared, "descriptions, states": meant}
    found = {name: round(torch.corrcoef(torch.stack([first, other]))[0, 1].item(), 3) for name, other in others.items()}
    for name, r in found.items():
        print(f"own masks of {len(people)} personas, {len(pairs)} pairs: {name} r = {r:.3f}")
    return found


@torch.no_grad()
def _description(backbone: Backbone, text: str) -> Tensor:
    """Mean final hidden state [D] over a description."""
    ids = torch.tensor([backbone.tokenizer(text)["input_ids"]], device=backbone.device)
    return backbone.model.base_model(ids, use_cache=False).last_hidden_state[0].float().mean(0)  # type: ignore[operator, union-attr]


def side_by_side(comparison: Comparison, methods: Sequence[str], rows: int, note: str) -> dict[str, dict[str, Losses]]:
    """Losses by method and persona; `note` tells results of other settings from these."""
    file = comparison.output.path / "methods.json"
    kept: dict[str, Losses] = json.loads(file.read_text()) if file.exists() else {}
    results: dict[str, dict[str, Losses]] = {}
    for method in methods:
        began, made = time.process_time(), 0
        for data in comparison.people:
            key = f"{comparison.ratio} {method} {data.persona_id} {data.sha256[:12]} {note}"
            if key not in kept:
                kept[key], made = comparison.losses(method, data, rows), made + 1
                file.write_text(json.dumps(kept, indent=1))
            results.setdefault(method, {})[data.persona_id] = kept[key]
        if made:
            print(f"ratio {comparison.ratio}: {method}, {time.process_time() - began:.0f} CPU s", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "manifests/quickstart/run.yaml")
    parser.add_argument("--output", type=Path, nargs="+", default=[Path("runs/quickstart")])
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--personas", type=int, default=8)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--methods", nargs="+", help="all that the configuration allows")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows per persona and kind of text")
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--divergence", action="store_true")
    parser.add_argument("--seeds", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(options.config, options.settings)
    methods = options.methods or [method for method in (*SMALLER, TUNED, *WEIGHTS) if allowed(method, config)]
    outputs = [Output(path) for path in options.output]
    backbone = load_backbone(config.backbone, deepspeed=False)
    summary, seen = {}, dict[str, Any]()
    for ratio in options.ratios:
        learning = config.learning.model_copy(update={"ratio": ratio})
        output = next((output for output in outputs if output.ratio == ratio), outputs[0])
        people = read_people(options, output.path)
        at_ratio = config.model_copy(update={"learning": learning})
        comparison = Comparison(backbone, at_ratio, people, output, options.calibration)
        comparison.statistics = seen
        if options.seeds:
            summary[str(ratio)] = agreement(comparison)
            continue
        if options.divergence:
            summary[str(ratio)] = divergence(comparison, [method for method in methods if method in WEIGHTS])
            continue
        note = f"{options.rows} {options.calibration} {options.settings}"
        results = side_by_side(comparison, ["unpruned", *methods], options.rows, note)
        summary[str(ratio)] = table(results, methods, ratio)
    print(json.dumps(summary))


def allowed(method: str, config: RunConfig) -> bool:
    if method == TUNED:
        return importlib.util.find_spec("peft") is not None
    if method == POOLED:
        return config.learning.needs_pooled_mask
    return method not in ("gumbel", "soft_topk") or config.learning.optimizer == "adam"


if __name__ == "__main__":
    main()
