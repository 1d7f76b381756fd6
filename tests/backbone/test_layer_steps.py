import pytest
import torch
from tiny_models import FAMILIES, SCALED_HEADS, tiny

from persona_pruner.backbone.channels import decoder_layers, forward_hooks
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.layer_steps import LayerSteps, WaitingRows

BATCHES = (torch.arange(10, 22).view(2, 6), torch.arange(30, 34)[None])


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED_HEADS])
@pytest.mark.parametrize("prefix", [None, (5, 6, 7, 8)])
def test_layer_after_layer_is_a_whole_pass(tmp_path, family, prefix):
    with BackboneRunner(tiny(tmp_path, family)) as runner, torch.no_grad():
        runner.masks.set((torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float())
        steps, rows = LayerSteps(runner), WaitingRows(prefix, BATCHES)
        states = steps.begin(rows)
        for number in range(3):
            states = steps.advance(number, rows, states)
        last = []

        def see(module, inputs, output):
            last.append(output[0] if isinstance(output, tuple) else output)

        cache = None if prefix is None else runner.prefix([prefix])
        with forward_hooks([(decoder_layers(runner.model)[-1], see)]):
            for tokens in BATCHES:
                runner.hidden(tokens, cache, None if prefix is None else torch.zeros(len(tokens), dtype=torch.long))
        assert len(states) == len(BATCHES) + (prefix is not None)
        for state, expected in zip(states[-len(BATCHES) :], last, strict=True):
            assert torch.equal(state, expected)


def test_the_model_is_whole_again_where_a_pass_fails(tmp_path):
    with BackboneRunner(tiny(tmp_path)) as runner, torch.no_grad():
        before = runner.hidden(BATCHES[0])
        steps = LayerSteps(runner)
        with pytest.raises(StopIteration):
            steps.advance(1, WaitingRows(None, BATCHES), [])
        assert torch.equal(runner.hidden(BATCHES[0]), before)
