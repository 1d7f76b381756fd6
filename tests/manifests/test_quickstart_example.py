"""The shipped example: made by the scripts beside it, and a backbone that really plays the persona it is given."""

import json
import random
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "manifests" / "quickstart"
sys.path.insert(0, str(EXAMPLE))

import make_corpus  # noqa: E402


def rows(name):
    return [json.loads(line) for line in (EXAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["personas", "instructions", "conversations"])
def test_script_reproduces_the_shipped_file(name, tmp_path):
    make_corpus.main(tmp_path)
    assert (tmp_path / f"{name}.jsonl").read_bytes() == (EXAMPLE / f"{name}.jsonl").read_bytes()


def test_example_has_the_promised_size():
    families = [row["metadata"]["family"] for row in rows("personas")]
    questions = {" ".join(row["instruction"].split()) for row in rows("instructions")}
    assert len(families) >= 24
    assert sorted(families.count(family) for family in set(families[:8])) == [4] * 4
    assert all(families[:8].count(family) == 2 for family in families[:8])
    assert len(questions) >= 800
    assert (EXAMPLE / "backbone" / "model.safetensors").stat().st_size <= 10_000_000


def test_no_character_of_the_manifest_is_trained_on():
    held_out = {character.traits for _, _, character in make_corpus.manifest_characters()}
    drawn = make_corpus.training_characters(random.Random(0))
    assert held_out.isdisjoint(next(drawn).traits for _ in range(20_000))


def test_backbone_conditions_on_the_persona():
    train_backbone = pytest.importorskip("train_backbone")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "backbone", dtype="float32").eval()
    sequences = train_backbone.Sequences(AutoTokenizer.from_pretrained(EXAMPLE / "backbone"))
    figures = train_backbone.heldout_figures(model, sequences, count=12)
    assert figures["difference"] >= 0.5
    shipped = json.loads((EXAMPLE / "backbone" / "figures.json").read_text())
    assert shipped["difference"] >= 0.5
