"""Fixed batches of whole prompts, for every architecture, and how a token is chosen."""

import pytest
import torch
from decoding_examples import FAMILIES, HYBRID, plain_samples, prompts, random_model, sampling, under_three_masks

from persona_pruner.backbone.decoding import PaddedDecoder, Sampling, choose
from persona_pruner.backbone.forward import BackboneRunner


@pytest.mark.parametrize("family", [*HYBRID, *FAMILIES, "opt"])
def test_padded_rows_sample_as_the_plain_model(tmp_path, family):
    backbone = random_model(tmp_path, family)
    asked = prompts(rows=5, personas=2)
    with BackboneRunner(backbone) as runner:
        sampled = PaddedDecoder(runner, sampling(batch_size=3)).decode(asked)
    assert [each.tokens for each in sampled] == plain_samples(backbone, asked)


def test_rows_of_one_batch_sample_each_under_its_own_mask(tmp_path):
    backbone = random_model(tmp_path, "opt")
    masks_MLI, asked = under_three_masks(prompts(rows=6, personas=2))
    with BackboneRunner(backbone) as runner:
        sampled = PaddedDecoder(runner, sampling(batch_size=4), masks_MLI).decode(asked)
    assert [each.tokens for each in sampled] == plain_samples(backbone, asked, masks_MLI)


LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0]])


def frequencies(settings, draws=20_000):
    drawn = choose(LOGITS.expand(draws, -1), torch.linspace(0, 1, draws + 1, dtype=torch.float64)[:-1], settings)
    return torch.bincount(drawn, minlength=4) / draws


def test_tokens_come_as_often_as_their_probability_says():
    for temperature in (1.0, 0.7):
        expected = torch.softmax(LOGITS[0] / temperature, -1)
        assert torch.allclose(frequencies(Sampling(temperature, 1.0, 0, 1)), expected, atol=1e-3)


def test_top_p_keeps_the_most_probable_tokens_that_reach_it():
    probs = torch.softmax(LOGITS[0], -1)
    kept = probs.clone()
    kept[[0, 3]] = 0
    assert torch.allclose(frequencies(Sampling(1.0, 0.7, 0, 1)), kept / kept.sum(), atol=1e-3)
    assert frequencies(Sampling(1.0, 0.1, 0, 1))[1] == 1


def test_temperature_0_is_greedy():
    assert choose(LOGITS, torch.tensor([0.99], dtype=torch.float64), Sampling(0, 1.0, 0, 1)).tolist() == [1]
