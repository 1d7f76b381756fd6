"""Continuous batching gives every row the tokens that the plain model gives it alone."""

import pytest
import torch
from decoding_examples import FAMILIES, plain_samples, prompts, random_model, sampling, under_three_masks

from persona_pruner.backbone.continuous import SlotDecoder
from persona_pruner.backbone.forward import BackboneRunner


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_every_length_and_two_personas_sample_as_the_plain_model(tmp_path, family):
    """Prefixes are longer than the sliding windows, and rows end and are replaced at different times."""
    backbone = random_model(tmp_path, family)
    with BackboneRunner(backbone) as runner:
        asked = prompts(rows=10, personas=2, ragged=True)
        sampled = SlotDecoder(runner, sampling(batch_size=3)).decode(asked)
    assert SlotDecoder.supports(runner)
    assert [each.tokens for each in sampled] == plain_samples(backbone, asked)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_of_one_batch_sample_each_under_its_own_mask(tmp_path, family):
    backbone = random_model(tmp_path, family)
    masks_MLI, asked = under_three_masks(prompts(rows=9, personas=2, ragged=True))
    with BackboneRunner(backbone) as runner:
        sampled = SlotDecoder(runner, sampling(batch_size=4), masks_MLI).decode(asked)
    expected = plain_samples(backbone, asked, masks_MLI)
    assert [each.tokens for each in sampled] == expected
    assert expected != plain_samples(backbone, asked)


def test_the_batch_size_does_not_change_the_samples(tmp_path):
    backbone = random_model(tmp_path, "llama")
    asked = prompts(rows=9, personas=1)
    with BackboneRunner(backbone) as runner:
        first, second = (SlotDecoder(runner, sampling(batch_size=size)).decode(asked) for size in (1, 16))
    assert first == second


def test_answers_that_reach_the_limit_are_not_finished(tmp_path):
    backbone = random_model(tmp_path, "llama")
    asked = prompts(rows=8, personas=1)
    with BackboneRunner(backbone) as runner:
        for each in SlotDecoder(runner, sampling(batch_size=3)).decode(asked):
            assert each.finished == (len(each.tokens) < len(asked[0].draws_T))


def test_caches_of_more_than_keys_and_values_are_not_supported(tmp_path):
    for family in ("qwen3_5_text", "olmo_hybrid"):
        backbone = random_model(tmp_path / family, family)
        with BackboneRunner(backbone) as runner:
            assert not SlotDecoder.supports(runner)


def test_nothing_asked_is_nothing_sampled(tmp_path):
    with BackboneRunner(random_model(tmp_path, "llama")) as runner, torch.no_grad():
        assert SlotDecoder(runner, sampling()).decode([]) == []
