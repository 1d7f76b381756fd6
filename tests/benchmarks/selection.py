"""What the data of a mask are worth, one change at a time (the papers' ablations): held-out loss on the personas' real
conversations, in nats per token, of masks trained on so many rows.

    python tests/benchmarks/selection.py [--personas 6] [--questions 1500] [--rows 96] [--steps 60] [--example]
        [--arms random original half quarter other both] [--quick]

`selected`: the backbone's answers to the most revealing questions. `random`: as many random questions. `original`: the
source's own answers in place of the backbone's (synthesis.rewrite.backend: none). `half`, `quarter`: of the selected.
`other`: the most revealing questions of RoleBench and Alpaca; `both`: of either source.
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
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.synthesis.select import select_questions
from persona_pruner.synthesis.sensitivity import Sensitivity, choose_references
from persona_pruner.synthesis.sources import Question, load_question_set, question_id

ARMS = ("random", "original", "half", "quarter", "other", "both")


class Ablation:
    """Rows of one persona by arm. `questions` of the source, `others` of another one."""

    def __init__(
        self, backbone: Backbone, config: RunConfig, questions: list[Question], others: list[Question], rows: int
    ) -> None:
        self.backbone, self.config, self.count = backbone, config, rows
        self.questions, self.others = questions, others

    def rows(self, who: Persona, scores: Tensor, arm: str) -> list[Row]:
        """`scores` of `questions` and `others`."""
        own = len(self.questions)
        within = {"other": slice(own, None), "both": slice(None)}.get(arm, slice(own))
        count = {"half": self.count // 2, "quarter": self.count // 4}.get(arm, self.count)
        method = "random" if arm == "random" else "top_k"
        select = self.config.synthesis.select.model_copy(update={"method": method, "k": count})
        candidates = [*self.questions, *self.others][within]
        if arm == "original":
            keep = [n for n, question in enumerate(candidates) if question.answer]
            candidates, scores = [candidates[n] for n in keep], scores[within][keep]
        else:
            scores = scores[within]
        chosen = [candidates[n] for n in select_questions(select, candidates, scores, seed=who.id)]
        if arm == "original":
            return [Row(question.text, question.answer or "") for question in chosen]
        texts = [question.text for question in chosen]
        return sample(self.backbone, configuration(), who.description, texts, len(texts))

    def loss(self, who: Persona, rows: list[Row], steps: int) -> float:
        data = PersonaData(who.id, who.description, tuple(rows), (), "selection")
        keep_LI = train(self.backbone, data, steps=steps).keep_LI
        return heldout_loss(self.backbone, configuration(steps=steps), who.description, who.real, keep_LI)


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
    parser.add_argument("--arms", nargs="+", default=["random"], choices=ARMS)
    parser.add_argument("--example", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.personas, options.questions, options.rows, options.steps = 2, 40, 16, 3
    torch.set_num_threads(1)
    config = load_config(EXAMPLE / "run.yaml") if options.example else configuration()
    backbone = load_backbone(config.backbone, deepspeed=False)
    who, references, questions = shipped(config, options) if options.example else shared(backbone, config, options)
    others = [Question(question_id(text), text, None) for text in random.Random(1).sample(pool(), len(questions))]
    others = others if {"other", "both"} & set(options.arms) else []
    scorer = Sensitivity(backbone, config, [q.text for q in (*questions, *others)], references)
    ablation = Ablation(backbone, config, questions, others, options.rows)
    losses: dict[str, list[float]] = {arm: [] for arm in ("selected", *options.arms)}
    for p in who:
        ((_, scores),) = scorer.tile([manifest.Persona(p.id, p.description)])
        assert isinstance(scores, Tensor)
        for arm, found in losses.items():
            found.append(ablation.loss(p, ablation.rows(p, scores, arm), options.steps))
        print(f"{p.id}: " + ", ".join(f"{arm} {found[-1]:.4f}" for arm, found in losses.items()), flush=True)
    result: dict[str, object] = {"personas": len(who), "selected": round(statistics.mean(losses["selected"]), 4)}
    for arm in options.arms:
        worse = [other - own for own, other in zip(losses["selected"], losses[arm], strict=True)]
        mean, spread = statistics.mean(worse), statistics.stdev(worse) if len(worse) > 1 else 0.0
        better = sum(d > 0 for d in worse)
        print(
            f"{arm:<10}{statistics.mean(losses[arm]):.4f}, {mean:+.4f} against selected "
            f"(standard deviation over personas {spread:.4f}; selected is better for {better} of {len(worse)})"
        )
        result[arm] = {"gain": round(mean, 4), "deviation": round(spread, 4), "better": better}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
