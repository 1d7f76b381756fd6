import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "learning"))
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.dataset import Row
from persona_pruner.errors import PersonaError
from persona_pruner.evaluation.likelihood import heldout_loss, heldout_losses


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_the_mean_over_all_answer_tokens(tmp_path, masked):
    backbone, config, data = tiny(tmp_path), tiny_config(), persona_data("Ann")
    keep = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) > 0.5 if masked else None
    total, tokens = 0.0, 0
    with ChannelMasks(backbone.model) as masks:
        masks.set(None if keep is None else keep.float())
        for row in data.heldout:
            prompt = persona_prefix(backbone.tokenizer, config.prompt, data.description)
            prompt += question_suffix(backbone.tokenizer, config.prompt, data.description, row.question)
            answer = answer_tokens(backbone.tokenizer, row.answer)
            logits = backbone.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total += F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            tokens += len(answer)
    found = heldout_loss(backbone, config, data.description, data.heldout, keep)
    assert found == pytest.approx(total / tokens, rel=1e-5)


def test_no_rows_and_rows_that_are_too_long_are_named(tmp_path):
    backbone, config = tiny(tmp_path), tiny_config(max_row_tokens=60)
    with pytest.raises(PersonaError) as caught:
        heldout_loss(backbone, config, "Ann", (), None)
    assert caught.value.cause == "empty"
    with pytest.raises(PersonaError, match=r"row 1 has \d+ tokens .*max_row_tokens is 60") as caught:
        heldout_loss(backbone, config, "Ann", (Row("a", "b"), Row("a", "b" * 80)), None)
    assert caught.value.cause == "row_too_long"


def test_losses_of_several_masks_are_those_of_each_alone(tmp_path):
    backbone, config, data = tiny(tmp_path), tiny_config(), persona_data("Ann")
    masks = {"unpruned": None, "half": torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) > 0.5}
    every, persona = heldout_losses(backbone, config, data.description, data.heldout, masks)
    for name, mask in masks.items():
        assert every[name] == pytest.approx(heldout_loss(backbone, config, data.description, data.heldout, mask))
    assert persona["unpruned"] != pytest.approx(every["unpruned"], rel=1e-3)
