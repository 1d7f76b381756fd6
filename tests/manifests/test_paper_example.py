"""The published recipe as a configuration."""

from pathlib import Path

import yaml

from persona_pruner.config.load import check_config, load_config
from persona_pruner.dataset import uses_unfinished_answers
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.rewrite.base import messages
from persona_pruner.synthesis.sources import Question, question_id

FILE = Path(__file__).parents[2] / "manifests" / "paper.yaml"


def test_it_is_a_valid_configuration_of_the_published_method():
    config = load_config(FILE)
    objective = config.learning.objective
    assert (objective.cross_entropy, objective.distillation) == (1, 0)
    assert not uses_unfinished_answers(config)
    assert config.synthesis.layers == (4, 23)
    assert config.synthesis.references.count == 10


def test_an_appendix_of_other_wording_reaches_the_rewriting_model_word_for_word():
    prompt = {
        "system": "Act as {persona}.",
        "rewrite_system": "SYSTEM <{persona}>",
        "rewrite_with_reference": "P: {persona}\nQ: {question}\nA: {answer}\nE",
    }
    config = check_config(yaml.safe_load(FILE.read_text(encoding="utf-8")) | {"prompt": prompt})
    question = Question(question_id("Why?"), "Why?", "So.")
    assert messages(config, Persona("ada", "Ada"), question) == [
        {"role": "system", "content": "SYSTEM <Ada>"},
        {"role": "user", "content": "P: Ada\nQ: Why?\nA: So.\nE"},
    ]
