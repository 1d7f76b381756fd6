"""One scoring worker without Ray; groups of shards run in tests/learning/test_shards.py."""

import tiny_models

from persona_pruner.config.load import check_config
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.rewrite.base import Request
from persona_pruner.synthesis.scoring_worker import open_backbone
from persona_pruner.synthesis.sources import Question, question_id

PERSONAS = [Persona(f"p{n}", f"A person who likes {thing}") for n, thing in enumerate("abc")]


def test_a_backbone_in_one_process_scores_and_answers(tmp_path):
    synthesis = {"references": {"count": 2}, "rewrite": {"max_new_tokens": 4}}
    config = check_config({"backbone": {"path": str(tiny_models.save_tiny(tmp_path))}, "synthesis": synthesis})
    worker = open_backbone(config, ["Why?", "Who are you?"], PERSONAS)
    scored = worker.tile(PERSONAS[:2])
    assert [persona.id for persona, _ in scored] == ["p0", "p1"]
    assert all(scores.isfinite().all() and len(scores) == 2 for _, scores in scored)
    request = Request(PERSONAS[0], Question(question_id("Why?"), "Why?", None), 0)
    assert worker.answers([request, request]) == worker.answers([request]) * 2
    assert worker.fingerprint() == worker.model
