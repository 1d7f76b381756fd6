"""The published recipe as a configuration."""

import re
from pathlib import Path

import torch
import yaml

from persona_pruner.config.load import check_config, load_config
from persona_pruner.dataset import uses_unfinished_answers
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.rewrite.base import messages
from persona_pruner.synthesis.select import select_questions
from persona_pruner.synthesis.sources import Question, question_id

FILE = Path(__file__).parents[2] / "manifests" / "paper.yaml"


def test_it_is_a_valid_configuration_of_the_published_method():
    config = load_config(FILE)
    objective = config.learning.objective
    assert (objective.cross_entropy, objective.distillation) == (1, 0)
    assert not uses_unfinished_answers(config)
    assert config.synthesis.layers == (4, 23)
    assert config.synthesis.references.count == 10


def test_the_recipes_of_the_other_sources_are_valid_as_they_stand_there():
    text = re.sub(r"(?m)^  #( - |   )(\w+: )", r"   \1\2", FILE.read_text(encoding="utf-8"))
    sources = check_config(yaml.safe_load(text)).synthesis.sources
    assert [source.path for source in sources] == ["tatsu-lab/alpaca", "Open-Orca/OpenOrca", "alpaca_p.jsonl"]
    assert [source.answer for source in sources] == ["output", "response", "output"]
    assert sources[0].join == sources[2].join


def test_a_quantile_takes_all_questions_above_it():
    tree = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    tree["synthesis"]["select"] = {"method": "quantile", "quantile": 0.9}
    select = check_config(tree).synthesis.select
    questions = [Question(f"{number:016x}", f"Question {number}?", None) for number in range(5000)]
    assert len(select_questions(select, questions, torch.arange(5000.0))) == 500


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
