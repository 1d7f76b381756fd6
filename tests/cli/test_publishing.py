import json

import pytest
from huggingface_hub import ModelCard
from mask_examples import mask
from typer.testing import CliRunner

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
from persona_pruner.cli import app
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


@pytest.fixture
def output(tmp_path):
    for seed, persona_id in enumerate(("ada", "bo")):
        open_storage(tmp_path / "out").put(keys.mask(persona_id), mask(persona_id, seed=seed).to_bytes())
    return tmp_path / "out"


def invoke(*words):
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_card_is_printed_as_it_would_be_pushed(output):
    card = ModelCard(invoke("card", output, "--to", "hf://crew/masks", "--base-model", "org/llama"))
    assert card.data.base_model == "org/llama"
    assert "2 masks, one for each persona" in card.text


def test_push_says_what_it_moved(output, tmp_path):
    assert invoke("push", output, "--to", tmp_path / "there").endswith("there: 4 files pushed, 0 were there already\n")
    said = json.loads(invoke("push", output, "--to", tmp_path / "there", "--json"))
    assert said == {"to": str(tmp_path / "there"), "moved": [], "unchanged": 4}
