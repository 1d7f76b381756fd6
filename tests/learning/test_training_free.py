import pytest
import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.channels import find_ffns
from persona_pruner.learning.encoding import encode
from persona_pruner.learning.training_free import (
    activation,
    magnitude,
    random,
    rank_normalize,
)

CONFIG = tiny_config()


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_magnitude_is_the_norm_of_all_weights_of_a_channel(tmp_path, family):
    backbone = tiny(tmp_path, family)
    ffn = find_ffns(backbone.model)[1]
    parts = [ffn.output.weight[:, 5]]
    for linear in ffn.inputs:
        parts += [linear.weight[5], linear.weight[64 + 5]] if ffn.fused else [linear.weight[5]]
    assert magnitude(backbone)[1, 5].item() == pytest.approx(torch.cat(parts).norm().item(), rel=1e-5)


def test_activation_is_the_channels_size_at_the_answers_times_its_output_weights(tmp_path):
    backbone, data = tiny(tmp_path), persona_data("Ann", rows=5)
    encoded = encode(backbone.tokenizer, CONFIG.prompt, data, 2048)
    ffn, squares = find_ffns(backbone.model)[2], []
    for row in encoded.train:
        seen = []
        hook = ffn.output.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
        backbone.model(torch.tensor([[*encoded.prefixes[0], *row.tokens]]))
        hook.remove()
        squares.append(seen[0][-row.answer - 1 : -1].square())
    wanted = torch.cat(squares).mean(0).sqrt() * ffn.output.weight.norm(dim=0)
    assert torch.allclose(activation(backbone, CONFIG, data)[2], wanted, rtol=1e-4)


def test_random_scores_come_from_the_seed(tmp_path):
    backbone = tiny(tmp_path)
    assert torch.equal(random(backbone, 1), random(backbone, 1))
    assert not torch.equal(random(backbone, 1), random(backbone, 2))


def test_ranks_keep_the_order_and_fill_the_unit_interval():
    scores = torch.tensor([[3.0, -1.0, 100.0, 3.0]])
    assert rank_normalize(scores).tolist() == [[0.375, 0.125, 0.875, 0.625]]
