"""Steps to the cold start's final held-out loss, starting cold and from another persona's scores, side by side.

    python tests/benchmarks/warm_start.py [--personas 8] [--steps 60] [--quick]

Cold: zeros. Warm: activation statistics (the default); the scores of another persona; the mean of all the others'.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from mask_quality import configuration, train
from persona_text import Persona, personas
from torch import Tensor

from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.outcome import Progress
from persona_pruner.learning.trainer import MaskTrainer


def curve(backbone: Backbone, who: Persona, steps: int, every: int, init: str, warm: Tensor | None) -> list[float]:
    """Held-out losses after every `every` steps."""
    config = configuration(steps=steps, evaluate_every=every, init=init, schedule="constant")
    losses: list[float] = []

    class Curve(TrainingCallbacks):
        def report(self, progress: Progress) -> None:
            if progress.heldout_loss is not None and progress.step % every == 1:
                losses.append(progress.heldout_loss)

        def warm_scores(self, persona_id: str) -> Tensor | None:
            return warm

    (result,) = MaskTrainer(backbone, config).train([who.data()], run_id="b", callbacks=Curve())
    assert result.heldout_loss is not None
    return [*losses, result.heldout_loss]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("runs/persona_text"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone(configuration().backbone, deepspeed=False)
    count, steps, every = (2, 4, 2) if options.quick else (options.personas, options.steps, options.every)
    sizes = (16, 8) if options.quick else (64, 16)
    who = personas(backbone, configuration(), count, options.cache, *sizes)
    scores = [train(backbone, p.data(), steps=steps, keep_scores=True).scores_LI for p in who]
    ratios: dict[str, list[float]] = {}
    for number, p in enumerate(who):
        others = [s.float() for n, s in enumerate(scores) if n != number and s is not None]
        cold = curve(backbone, p, steps, every, "zeros", None)
        starts = {
            "activation": ("activation", None),
            "another persona": ("persona:x", others[0]),
            "mean of the others": ("mean:x,y", torch.stack(others).mean(0)),
        }
        for name, (init, warm) in starts.items():
            losses = curve(backbone, p, steps, every, init, warm)
            reached = next((n for n, loss in enumerate(losses, 1) if loss <= cold[-1]), None)
            ratios.setdefault(name, []).append(len(cold) / reached if reached else 0.0)
            print(f"{p.id}: cold {cold[-1]:.4f}; {name} {losses[-1]:.4f}, there after "
                  f"{reached * every if reached else 'never'} of {steps} steps", flush=True)  # fmt: skip
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    print(json.dumps({"times_fewer_steps": medians, "by_persona": ratios}))


if __name__ == "__main__":
    main()
