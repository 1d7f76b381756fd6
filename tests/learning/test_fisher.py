"""Fisher scores against the plain formula: one row at a time, autograd through the whole model."""

import torch
import torch.nn.functional as F
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.channels import find_ffns
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.learning.batches import MicroBatchConfig, examples_by_prefix
from persona_pruner.learning.encoding import encode
from persona_pruner.learning.fisher import fisher_scores


def test_fisher_scores_are_squared_gradients_of_each_rows_cross_entropy(tmp_path):
    backbone, config = tiny(tmp_path), tiny_config(micro_batch_tokens=150)
    encoded = encode(backbone.tokenizer, config.prompt, persona_data("Ann", rows=5), 2048)
    prefix, ffns = encoded.prefixes[0], find_ffns(backbone.model)
    wanted, tokens = torch.zeros(3, 64), 0
    for row in encoded.train:
        ids = torch.tensor([[*prefix, *row.tokens]])
        own = (torch.arange(ids.shape[1]) >= len(prefix)).float()[None, :, None]
        mask = torch.ones(3, 64, requires_grad=True)
        hooks = [
            ffn.output.register_forward_pre_hook(
                lambda _, inputs, layer=layer, mask=mask, own=own: (inputs[0] * (mask[layer] * own + 1 - own),)
            )
            for layer, ffn in enumerate(ffns)
        ]
        logits = backbone.model(ids, use_cache=False).logits[0, -row.answer - 1 : -1]
        F.cross_entropy(logits, ids[0, -row.answer :], reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        wanted += mask.grad.square()
        tokens += row.answer
    with BackboneRunner(backbone) as runner:
        ((_, examples),) = examples_by_prefix(encoded)
        scores = fisher_scores(runner, prefix, examples, MicroBatchConfig.of(config, backbone.device))
    assert torch.allclose(scores, wanted / tokens, rtol=1e-4, atol=1e-9)
