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
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compared_methods import SMALLER, TUNED, WEIGHTS, Comparison, Losses, Output, allowed
from method_tables import agreement, divergence, table

from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.load import load_config
from persona_pruner.dataset import PersonaData, read_persona_data
from persona_pruner.manifest import read_manifest
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

ROOT = Path(__file__).parents[2]


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


if __name__ == "__main__":
    main()
