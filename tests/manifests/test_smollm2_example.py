"""The example on a real chat model: its files are whole and fit each other. The model itself is not downloaded here."""

import json
import sys
from pathlib import Path

from persona_pruner.config.load import load_config
from persona_pruner.manifest import read_manifest

EXAMPLE = Path(__file__).parents[2] / "manifests" / "smollm2"
sys.path.insert(0, str(EXAMPLE))

import make_questions  # noqa: E402


def rows(name):
    return [json.loads(line) for line in (EXAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_script_reproduces_the_questions(tmp_path):
    make_questions.main(tmp_path)
    assert (tmp_path / "questions.jsonl").read_bytes() == (EXAMPLE / "questions.jsonl").read_bytes()
    assert len({row["instruction"] for row in rows("questions")}) >= 800


def test_personas_can_be_read_and_the_first_have_conversations():
    personas = read_manifest(str(EXAMPLE / "personas.jsonl")).personas
    spoken = [row["persona_id"] for row in rows("conversations")]
    assert len(personas) >= 12
    assert all(spoken.count(persona.id) >= 24 for persona in personas[:4])
    assert set(spoken) <= {persona.id for persona in personas}


def test_configuration_is_valid_and_finds_its_files():
    config = load_config(EXAMPLE / "run.yaml")
    assert Path(config.synthesis.sources[0].path).resolve() == EXAMPLE / "questions.jsonl"
    assert Path(config.evaluation.conversations).resolve() == EXAMPLE / "conversations.jsonl"
    evaluated = load_config(EXAMPLE / "evaluate.yaml")
    assert evaluated.backbone == config.backbone
    assert evaluated.prompt == config.prompt
