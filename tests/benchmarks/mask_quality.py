"""Held-out loss of every kind of mask, on synthesized answers and on real conversations of the same personas.

    python tests/benchmarks/mask_quality.py [--personas 3] [--steps 150] [--quick] [--seeds]

--seeds instead trains 24 personas with two seeds and prints how pairwise mask similarities correlate across seeds and
with the similarity of the descriptions (word overlap).
"""

import argparse
import json
import statistics
import time
from itertools import combinations
from pathlib import Path

import torch
from persona_text import Persona, generic, personas
from torch import Tensor

from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.load import check_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.learning.budgets import kept_channels
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.methods.one_pass import OnePass
from persona_pruner.learning.outcome import TrainingStatus
from persona_pruner.learning.pooled import global_config, train_pooled
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.learning.training_free import activation, magnitude, random
from persona_pruner.masks.format import Mask
from persona_pruner.masks.weight_mask import WeightMask

BACKBONE = "../shared/data/backbone"
PUBLISHED = ("magnitude", "random", "activation generic", "wanda generic")
STRUCTURED = ("magnitude", "random", "activation generic", "activation own", "contrastive", "global", "other persona")


def configuration(**learning: object) -> RunConfig:
    return check_config({"backbone": {"path": BACKBONE}, "learning": {"evaluate_every": 100000, **learning}})


def train(backbone: Backbone, data: PersonaData, **learning: object) -> Mask:
    (outcome,) = MaskTrainer(backbone, configuration(**learning)).train([data], run_id="benchmark")
    assert outcome.status is TrainingStatus.DONE, outcome.message
    assert outcome.mask is not None
    return outcome.mask


def wanda(backbone: Backbone, data: PersonaData, ratio: float) -> WeightMask:
    (result,) = OnePass(backbone, configuration(method="wanda", ratio=ratio)).train([data], run_id="benchmark")
    assert isinstance(result.mask, WeightMask), result.message
    return result.mask


def text_losses(backbone: Backbone, config: RunConfig, who: Persona, keep_LI: Tensor | None) -> dict[str, float]:
    texts = {"synthesized": who.heldout, "real": who.real}
    return {name: heldout_loss(backbone, config, who.description, rows, keep_LI) for name, rows in texts.items()}


def compare(backbone: Backbone, who: list[Persona], ratio: float, steps: int) -> dict[str, dict[str, list[float]]]:
    """Losses by method and text, one value a persona."""
    config = configuration(ratio=ratio, steps=steps)
    channels = 1024
    kept = kept_channels(channels, ratio, config.learning.channel_multiple)
    table: dict[str, dict[str, list[float]]] = {}

    def add(method: str, persona: Persona, keep_LI: Tensor | None) -> None:
        for text, loss in text_losses(backbone, config, persona, keep_LI).items():
            table.setdefault(method, {}).setdefault(text, []).append(loss)

    own = {p.id: train(backbone, p.data(), ratio=ratio, steps=steps).keep_LI for p in who}
    scores = {p.id: activation(backbone, config, p.data()) for p in who}
    fixed = {
        "magnitude": magnitude(backbone),
        "random": random(backbone, 0),
        "activation generic": activation(backbone, config, generic()),
    }
    pooled = train_pooled(backbone, global_config(config, ratio), [p.data() for p in who], "benchmark").mask
    assert pooled is not None
    for number, p in enumerate(who):
        before = time.monotonic()
        other = who[(number + 1) % len(who)]
        add("unpruned", p, None)
        add("STE own", p, own[p.id])
        for method in ("gumbel", "soft_topk"):
            add(method, p, train(backbone, p.data(), ratio=ratio, steps=steps, method=method).keep_LI)
        for method, score in fixed.items():
            add(method, p, topk_mask(score, kept))
        add("activation own", p, topk_mask(scores[p.id], kept))
        means = {name: s / s.mean(1, keepdim=True) for name, s in scores.items()}
        add("contrastive", p, topk_mask(means[p.id] - means[other.id], kept))
        for name, data in (("wanda generic", generic()), ("wanda own", p.data())):
            with wanda(backbone, data, ratio).apply(backbone.model, check_backbone=False):
                add(name, p, None)
        add("global", p, pooled.keep_LI)
        add("other persona", p, own[other.id])
        print(f"ratio {ratio}, {p.id}: {time.monotonic() - before:.0f} s", flush=True)
    return table


def show(ratio: float, table: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Print means over the personas; the figures that the issue asks for."""
    means = {method: {text: statistics.mean(v) for text, v in texts.items()} for method, texts in table.items()}
    print(f"\nratio {ratio}: mean over personas, nats per token\n{'method':<20}{'synthesized':>12}{'real':>9}")
    for method, texts in means.items():
        print(f"{method:<20}{texts['synthesized']:>12.4f}{texts['real']:>9.4f}")
    found: dict[str, float] = {}
    for text in ("synthesized", "real"):
        dense, ours = means["unpruned"][text], means["STE own"][text]
        published = min(means[method][text] for method in PUBLISHED)
        rival = min(STRUCTURED, key=lambda method: means[method][text])
        found[f"removed_{text}"] = 1 - (ours - dense) / (published - dense)
        found[f"margin_{text}"] = means[rival][text] - ours
        print(f"{text}: removes {found[f'removed_{text}']:.1%} of the strongest published baseline's increase; "
              f"best other structured mask: {rival}, worse by {found[f'margin_{text}']:.4f}")  # fmt: skip
    return found


def seeds(backbone: Backbone, who: list[Persona], steps: int) -> dict[str, float]:
    masks = [[train(backbone, p.data(), steps=steps, seed=seed) for p in who] for seed in (0, 1)]
    words = [set(p.description.lower().split()) for p in who]
    pairs = list(combinations(range(len(who)), 2))
    like = [torch.tensor([masks[seed][a].similarity(masks[seed][b]) for a, b in pairs]) for seed in (0, 1)]
    told = torch.tensor([len(words[a] & words[b]) / len(words[a] | words[b]) for a, b in pairs])
    across = torch.corrcoef(torch.stack(like))[0, 1].item()
    described = torch.corrcoef(torch.stack([like[0], told]))[0, 1].item()
    print(f"{len(who)} personas: similarities across seeds r = {across:.3f}, with descriptions r = {described:.3f}")
    return {"across_seeds": across, "with_descriptions": described}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--cache", type=Path, default=Path("runs/persona_text"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone(configuration().backbone, deepspeed=False)
    count = options.personas or (2 if options.quick else 24 if options.seeds else 3)
    sizes = (16, 8) if options.quick else (64, 16) if options.seeds else (256, 64)
    who = personas(backbone, configuration(), count, options.cache, *sizes)
    steps = 3 if options.quick else options.steps
    if options.seeds:
        print(json.dumps(seeds(backbone, who, steps)))
        return
    result = {}
    for ratio in options.ratios:
        table = compare(backbone, who, ratio, steps)
        result[str(ratio)] = {**show(ratio, table), "losses": table}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
