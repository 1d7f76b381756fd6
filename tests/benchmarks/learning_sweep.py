"""The sweep behind the learning defaults: held-out loss by setting, on synthesized and real text.

python tests/benchmarks/learning_sweep.py [--personas 2] [--ratio 0.5] [--quick]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from mask_quality import configuration, text_losses, train
from persona_text import personas

from persona_pruner.backbone.load import load_backbone

PAPER = {"cross_entropy": 1.0, "distillation": 0.0}
SETTINGS: dict[str, dict[str, object]] = {
    "default": {},
    "paper's objective": {"objective": PAPER},
    "rate x 3": {"learning_rate": 0.015},
    "rate / 3": {"learning_rate": 0.0017},
    "constant": {"schedule": "constant"},
    "cosine": {"schedule": "cosine"},
    "twice the steps": {"steps": 2},
    "half the steps": {"steps": 0.5},
    "from zeros": {"init": "zeros"},
    "from magnitude": {"init": "magnitude"},
    "8 rows": {"rows_per_step": 8},
    "32 rows": {"rows_per_step": 32},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--cache", type=Path, default=Path("runs/persona_text"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = configuration()
    backbone = load_backbone(config.backbone, deepspeed=False)
    sizes = (16, 8) if options.quick else (256, 64)
    who = personas(backbone, config, 1 if options.quick else options.personas, options.cache, *sizes)
    dense = [text_losses(backbone, config, p, None) for p in who]
    result = {}
    for name in options.settings[:2] if options.quick else options.settings:
        values = dict(SETTINGS[name])
        steps = 2 if options.quick else config.learning.steps
        values["steps"] = max(round(steps * float(values.get("steps", 1))), 1)  # type: ignore[arg-type]
        start = time.monotonic()
        masks = [train(backbone, p.data(), ratio=options.ratio, **values).keep_LI for p in who]
        taken = (time.monotonic() - start) / len(who)
        losses = [text_losses(backbone, config, p, mask) for p, mask in zip(who, masks, strict=True)]
        rises = {
            text: statistics.mean(own[text] - whole[text] for own, whole in zip(losses, dense, strict=True))
            for text in ("synthesized", "real")
        }
        print(
            f"{name:<20} synthesized +{rises['synthesized']:.4f}  real +{rises['real']:.4f}  {taken:.0f} s", flush=True
        )
        result[name] = rises
    print(json.dumps(result))


if __name__ == "__main__":
    main()
