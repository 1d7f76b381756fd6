"""The sweep behind the learning defaults: held-out loss by setting, on synthesized and real text.

    python tests/benchmarks/learning_sweep.py [--personas 2] [--ratio 0.5] [--run OUTPUT] [--quick]

On the shared backbone, or with --run on the shipped one, with the data of a finished quickstart (runs/quickstart).
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from mask_quality import configuration, text_losses, train
from persona_text import EXAMPLE, Persona, personas, shipped_personas

from persona_pruner import manifest
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.load import load_config
from persona_pruner.dataset import read_persona_data
from persona_pruner.storage.open import open_storage

PAPER = {"cross_entropy": 1.0, "distillation": 0.0}
SETTINGS: dict[str, dict[str, object]] = {
    "default": {},
    "paper's objective": {"objective": PAPER},
    "twice the rate": {"learning_rate": 2},
    "half the rate": {"learning_rate": 0.5},
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "last scores": {"average": 0.0},
    "linear, last scores": {"schedule": "linear", "average": 0.0},
    "twice the steps": {"steps": 2},
    "half the steps": {"steps": 0.5},
    "from zeros": {"init": "zeros"},
    "from magnitude": {"init": "magnitude"},
    "8 rows": {"rows_per_step": 8},
    "32 rows": {"rows_per_step": 32},
}
"""Changes of one setting; the rate and the steps are multiples of the default's."""


def shipped(run: str, count: int) -> list[Persona]:
    """Personas of a finished quickstart, with their data and their own conversations."""
    storage = open_storage(run)
    who = shipped_personas(load_config(EXAMPLE / "run.yaml"), count)
    data = [read_persona_data(storage, manifest.Persona(p.id, p.description)) for p in who]
    return [replace(p, train=own.train, heldout=own.heldout) for p, own in zip(who, data, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=2)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--cache", type=Path, default=Path("runs/persona_text"))
    parser.add_argument("--run", help="output of a finished quickstart")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(EXAMPLE / "run.yaml") if options.run else configuration()
    backbone = load_backbone(config.backbone, deepspeed=False)
    sizes = (16, 8) if options.quick else (256, 64)
    count = 1 if options.quick else options.personas
    who = shipped(options.run, count) if options.run else personas(backbone, config, count, options.cache, *sizes)
    dense = [text_losses(backbone, config, p, None) for p in who]
    learning = config.learning
    result = {}
    for name in options.settings[:2] if options.quick else options.settings:
        values = {"steps": 1.0, "learning_rate": 1.0, **SETTINGS[name]}
        values["steps"] = max(round((2 if options.quick else learning.steps) * values["steps"]), 1)  # type: ignore[operator]
        values["learning_rate"] *= learning.learning_rate  # type: ignore[operator]
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
