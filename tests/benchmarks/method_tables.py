"""What methods.py prints: losses side by side, how far masks lie apart, and what their likeness goes with.

Shapes: P personas, D model width.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from compared_methods import SMALLER, TEXTS, WEIGHTS, Comparison, Losses, Output
from torch import Tensor

from persona_pruner.backbone.load import Backbone
from persona_pruner.masks.weight_mask import WeightMask


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
