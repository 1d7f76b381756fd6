import pytest
import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.learning.batches import MicroBatchConfig, examples_by_prefix
from persona_pruner.learning.encoding import encode
from persona_pruner.learning.methods import input_statistics
from persona_pruner.learning.methods.input_statistics import block_matrices, collect

CONFIG = tiny_config()


def collected(backbone, encoded, gram=False):
    ((prefix, examples),) = examples_by_prefix(encoded)
    with BackboneRunner(backbone) as runner:
        settings = MicroBatchConfig.of(CONFIG, backbone.device)
        return {name: own for name, _, own in collect(runner, prefix, examples, settings, gram)}


def plain_inputs(backbone, encoded, name):
    """What a matrix reads at the answer positions of each row, every row run alone."""
    rows = []
    module = dict(backbone.model.named_modules())[name]
    for row in encoded.train:
        seen = []
        hook = module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0]))
        backbone.model(torch.tensor([[*encoded.prefixes[0], *row.tokens]]))
        hook.remove()
        rows.append(seen[0][-row.answer - 1 : -1].double())
    return rows


@pytest.mark.parametrize("gram_bytes", [1 << 30, 1])
def test_sums_are_those_of_rows_that_run_alone(tmp_path, monkeypatch, gram_bytes):
    monkeypatch.setattr(input_statistics, "GRAM_BYTES", gram_bytes)
    backbone = tiny(tmp_path)
    encoded = encode(backbone.tokenizer, CONFIG.prompt, persona_data("Ann", rows=5), 2048)
    found = collected(backbone, encoded, gram=True)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        rows, own = plain_inputs(backbone, encoded, name), found[name]
        tokens = torch.cat(rows)
        norms = torch.stack([row.norm(dim=0) for row in rows])
        assert torch.allclose(own.norm_I, tokens.norm(dim=0), rtol=1e-4)
        assert torch.allclose(own.gram_II.double(), tokens.T @ tokens, rtol=1e-3, atol=1e-4)
        for moments, values in ((own.token_moments(), tokens), (own.row_norm_moments(), norms)):
            assert torch.allclose(moments[0], values.mean(0), rtol=1e-4, atol=1e-6)
            assert torch.allclose(moments[1], values.var(0, unbiased=False), rtol=1e-3, atol=1e-6)


def test_every_attention_and_ffn_matrix_is_meant_and_the_head_is_not(tmp_path):
    with BackboneRunner(tiny(tmp_path)) as runner:
        names = list(block_matrices(runner))
    assert len(names) == 3 * 7
    assert not any("lm_head" in name for name in names)
