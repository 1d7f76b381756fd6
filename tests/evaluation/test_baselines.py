"""Baselines against their formulas, written out over the plain model's own hooks."""

import pytest
import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.channels import ChannelMasks, find_ffns, record_channels
from persona_pruner.config.load import check_config
from persona_pruner.evaluation import baselines as module
from persona_pruner.evaluation.baselines import Baselines, added_biases
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.persona_tokens import generic_data

KEPT = torch.tensor([40, 24, 32])


@pytest.fixture
def baselines(tmp_path, monkeypatch):
    rows = tmp_path / "generic.jsonl"
    rows.write_text("".join(f'{{"question": "What is {n}?", "answer": "It is {"so " * n}."}}\n' for n in range(1, 6)))
    config = tiny_config(tmp_path / "tiny")
    objective = check_config({"learning": {"objective": {"generic_rows": str(rows)}}}).learning.objective
    learning = config.learning.model_copy(update={"objective": objective})
    return Baselines(tiny(tmp_path / "tiny"), config.model_copy(update={"learning": learning}))


def answer_tokens(baselines):
    """Token ids [1, N] of each generic row behind its prefix, and which of them are answered from."""
    encoded = generic_data(baselines.backbone, baselines.config)
    for row in encoded.train:
        tokens = [*encoded.prefixes[0], *row.tokens]
        yield torch.tensor([tokens]), slice(len(tokens) - row.answer - 1, len(tokens) - 1)


def recorded(baselines):
    """[L, N, I] of all answer positions."""
    model, layers = baselines.backbone.model, []
    with torch.no_grad():
        for tokens, answer in answer_tokens(baselines):
            seen = {}
            with record_channels(model, lambda layer, hidden, seen=seen: seen.update({layer: hidden[0]})):
                model(tokens)
            layers.append(torch.stack([seen[layer][answer] for layer in range(3)]))
    return torch.cat(layers, 1).double()


def test_flap_keeps_what_fluctuates_over_all_layers_and_a_bias_stands_for_the_rest(baselines):
    channels_LNI = recorded(baselines)
    weights_LDI = torch.stack([ffn.output.weight.detach().double() for ffn in find_ffns(baselines.backbone.model)])
    scores_LI = channels_LNI.var(1, correction=0) * weights_LDI.square().sum(1)
    scores_LI = (scores_LI - scores_LI.mean(1, keepdim=True)) / scores_LI.std(1, keepdim=True)
    least = scores_LI.flatten().sort(descending=True).values[int(KEPT.sum()) - 1]
    keep_LI, bias_LD = baselines.mask("flap", KEPT, None)
    assert torch.equal(keep_LI, scores_LI >= least)
    dropped_LI = channels_LNI.mean(1).masked_fill(keep_LI, 0)
    torch.testing.assert_close(bias_LD, torch.einsum("ldi,li->ld", weights_LDI, dropped_LI))
    # With the biases the layer's mean output over these tokens is that of the whole layer.
    ffn = find_ffns(baselines.backbone.model)[1]
    whole, seen = ffn.output(channels_LNI[1].float()), channels_LNI[1].float()
    with added_biases(baselines.backbone, bias_LD):
        pruned = ffn.output(seen * keep_LI[1])
    torch.testing.assert_close(pruned.mean(0), whole.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ffn.output(seen), whole)


def test_taylor_keeps_the_largest_gradients_of_the_mask(baselines):
    model, total = baselines.backbone.model, 0.0
    ones_LI = torch.ones(3, 64, requires_grad=True)
    with ChannelMasks(model) as masks:
        masks.set(ones_LI)
        for tokens, answer in answer_tokens(baselines):
            logits = model(tokens).logits[0, answer]
            total = total + torch.nn.functional.cross_entropy(logits, tokens[0, answer.start + 1 :], reduction="sum")
        total.backward()
    keep_LI, bias_LD = baselines.mask("taylor", KEPT, None)
    assert torch.equal(keep_LI, topk_mask(ones_LI.grad.abs(), KEPT))
    assert bias_LD is None


def test_generic_activations_are_looked_at_once_and_do_not_depend_on_the_persona(baselines, monkeypatch):
    first, _ = baselines.mask("activation_generic", KEPT, persona_data("ann"))
    monkeypatch.setattr(module, "activation_scores", None)
    again, _ = baselines.mask("activation_generic", KEPT, persona_data("bo"))
    assert torch.equal(first, again)
    assert torch.equal(first.sum(1), KEPT)


def test_the_personas_own_activations_need_its_rows(baselines):
    assert baselines.mask("activation", KEPT, None) is None
    own, _ = baselines.mask("activation", KEPT, persona_data("ann"))
    other, _ = baselines.mask("activation", KEPT, persona_data("bo"))
    assert not torch.equal(own, other)
