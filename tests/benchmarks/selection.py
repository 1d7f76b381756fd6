"""Masks trained on the most revealing questions against masks trained on as many random ones: held-out loss on the
personas' real conversations (the paper's ablation, in likelihood terms).

    python tests/benchmarks/selection.py [--personas 6] [--questions 1500] [--steps 60] [--example] [--quick]

--example: the shipped backbone and its personas, which shows more of its persona than the shared one.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import torch
from mask_quality import configuration, train
from persona_text import EXAMPLE, Persona, personas, pool, sample, shipped_personas
from torch import Tensor

from persona_pruner import manifest
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.load import load_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.synthesis.select import select_questions
from persona_pruner.synthesis.sensitivity import Sensitivity, choose_references
from persona_pruner.synthesis.sources import Question, load_question_set, question_id


def loss(backbone: Backbone, who: Persona, asked: list[str], steps: int) -> float:
    """Held-out loss on real text, nats per token, of a mask trained on sampled answers to `asked`."""
    config = configuration(steps=steps)
    rows = sample(backbone, config, who.description, asked, len(asked))
    data = PersonaData(who.id, who.description, tuple(rows), (), "selection")
    return heldout_loss(backbone, config, who.description, who.real, train(backbone, data, steps=steps).keep_LI)


def shared(
    backbone: Backbone, config: RunConfig, options: argparse.Namespace
) -> tuple[list[Persona], list[manifest.Persona], list[Question]]:
    """Personas, references and questions of ../shared/data."""
    who = personas(backbone, config, options.personas + 10, options.cache, 0, 0)
    questions = [Question(question_id(text), text, None) for text in random.Random(0).sample(pool(), options.questions)]
    references = [manifest.Persona(p.id, p.description) for p in who[options.personas :]]
    return who[: options.personas], references, questions


def shipped(
    config: RunConfig, options: argparse.Namespace
) -> tuple[list[Persona], list[manifest.Persona], list[Question]]:
    """The same of the shipped example."""
    people = manifest.read_manifest(str(EXAMPLE / "personas.jsonl")).personas
    references = choose_references(people, config.synthesis.references.count, config.synthesis.seed)
    return (
        shipped_personas(config, options.personas),
        references,
        load_question_set(config.synthesis)[: options.questions],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=6)
    parser.add_argument("--questions", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--cache", type=Path, default=Path("runs/persona_text"))
    parser.add_argument("--example", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.personas, options.questions, options.rows, options.steps = 2, 40, 16, 3
    torch.set_num_threads(1)
    config = load_config(EXAMPLE / "run.yaml") if options.example else configuration()
    backbone = load_backbone(config.backbone, deepspeed=False)
    who, references, questions = shipped(config, options) if options.example else shared(backbone, config, options)
    scorer = Sensitivity(backbone, config, [q.text for q in questions], references)
    differences = []
    for p in who:
        ((_, scores),) = scorer.tile([manifest.Persona(p.id, p.description)])
        assert isinstance(scores, Tensor)
        losses = []
        for method in ("top_k", "random"):
            select = config.synthesis.select.model_copy(update={"method": method, "k": options.rows})
            chosen = select_questions(select, questions, scores, seed=p.id)
            losses.append(loss(backbone, p, [questions[i].text for i in chosen], options.steps))
        differences.append(losses[1] - losses[0])
        print(f"{p.id}: selected {losses[0]:.4f}, random {losses[1]:.4f}", flush=True)
    mean = statistics.mean(differences)
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    better = sum(d > 0 for d in differences)
    print(
        f"selected questions are better by {mean:.4f} nats per token "
        f"(standard deviation over personas {spread:.4f}), for {better} of {len(differences)}"
    )
    print(json.dumps({"gain": mean, "deviation": spread, "better": better, "personas": len(differences)}))


if __name__ == "__main__":
    main()
