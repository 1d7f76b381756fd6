"""The fast step against the plain formula: one whole prompt at a time, all logits, autograd through everything.

Shapes: P personas, L layers, I channels, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES, SCALED_HEADS, persona_data, tiny, tiny_config
from torch import Tensor

from persona_pruner.backbone.channels import find_ffns
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.schema import BackboneConfig, ObjectiveConfig
from persona_pruner.errors import BackboneError
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample, plan
from persona_pruner.learning.encoding import EncodedData, encode
from persona_pruner.learning.objective import mask_gradient, mask_losses
from persona_pruner.learning.teacher import TeacherCache

BOTH = ObjectiveConfig(cross_entropy=0.7, distillation=0.4)
PAPER = ObjectiveConfig(cross_entropy=1, distillation=0)


def naive(
    backbone: Backbone, masks_PLI: Tensor, personas: Sequence[EncodedData], objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Losses [P] and d sum(losses) / d masks [P, L, I], by the formula of the objective."""
    model, ffns = backbone.model, find_ffns(backbone.model)
    masks = masks_PLI.clone().requires_grad_()
    losses = []
    for mask_LI, persona in zip(masks, personas, strict=True):
        total, tokens = torch.zeros(()), 0
        for row in persona.train:
            ids = torch.tensor([[*persona.prefixes[0], *row.tokens]])
            answer = ids[0, -row.answer :]
            with torch.no_grad():
                dense_TV = model(ids, use_cache=False).logits[0, -row.answer - 1 : -1].float().log_softmax(-1)
            hooks = [
                ffn.output.register_forward_pre_hook(
                    lambda _, inputs, layer=layer, mask=mask_LI: (inputs[0] * mask[layer],)
                )
                for layer, ffn in enumerate(ffns)
            ]
            logq_TV = model(ids, use_cache=False).logits[0, -row.answer - 1 : -1].float().log_softmax(-1)
            for hook in hooks:
                hook.remove()
            total = total + objective.cross_entropy * F.nll_loss(logq_TV, answer, reduction="sum")
            total = total + objective.distillation * F.kl_div(logq_TV, dense_TV, reduction="sum", log_target=True)
            tokens += row.answer
        losses.append(total / tokens)
    whole = torch.stack(losses)
    whole.sum().backward()
    assert masks.grad is not None
    return whole.detach(), masks.grad


def fast(
    backbone: Backbone, masks_PLI: Tensor, personas: Sequence[EncodedData], settings: MicroBatchConfig, **options: bool
) -> tuple[Tensor, Tensor]:
    prefixes = [persona.prefixes[0] for persona in personas]
    examples = [
        TrainingExample(slot, (persona.persona_id, n), row, 1 / sum(r.answer for r in persona.train))
        for slot, persona in enumerate(personas)
        for n, row in enumerate(persona.train)
    ]
    with BackboneRunner(backbone, **options) as runner:
        objective = settings.objective
        teacher = TeacherCache(objective.top_logits, objective.head_tokens) if objective.distillation else None
        if teacher:
            for slot, prefix in enumerate(prefixes):
                own = [replace(example, slot=0) for example in examples if example.slot == slot]
                teacher.collect(runner, prefix, own, settings)
        grad, losses = mask_gradient(runner, masks_PLI, prefixes, examples, settings, teacher)
        alone = mask_losses(runner, masks_PLI, prefixes, examples, settings, teacher)
    assert torch.allclose(alone.total, losses.total, rtol=1e-5)
    return losses.total, grad


def encoded(backbone: Backbone, names: Sequence[str]) -> list[EncodedData]:
    config = tiny_config()
    return [encode(backbone.tokenizer, config.prompt, persona_data(name), 2048) for name in names]


def some_masks(backbone: Backbone, personas: int) -> Tensor:
    ffns = find_ffns(backbone.model)
    drawn = torch.rand(personas, len(ffns), ffns[0].channels, generator=torch.Generator().manual_seed(1))
    return (drawn > 0.4).float()


def assert_same(fast_pair: tuple[Tensor, Tensor], naive_pair: tuple[Tensor, Tensor], tolerance: float = 1e-5) -> None:
    assert torch.allclose(fast_pair[0], naive_pair[0], rtol=tolerance)
    error = (fast_pair[1] - naive_pair[1]).norm() / naive_pair[1].norm()
    assert error < tolerance, f"gradient differs by {error:.1e}"
    assert naive_pair[1].abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_the_plain_formula_in_every_family(tmp_path, family):
    backbone = tiny(tmp_path, family)
    personas, masks = encoded(backbone, ["Ann"]), some_masks(backbone, 1)
    assert_same(fast(backbone, masks, personas, MicroBatchConfig(BOTH)), naive(backbone, masks, personas, BOTH))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_personas_with_prefixes_of_different_lengths_share_a_step(tmp_path, family):
    backbone = tiny(tmp_path, family)
    personas, masks = encoded(backbone, ["Al", "Barbara", "Cyril"]), some_masks(backbone, 3)
    assert len({len(persona.prefixes[0]) for persona in personas}) == 3
    assert_same(fast(backbone, masks, personas, MicroBatchConfig(BOTH)), naive(backbone, masks, personas, BOTH))


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_a_head_of_all_tokens_is_exact_and_a_part_of_them_comes_close(tmp_path, family):
    backbone = tiny(tmp_path, family)
    personas, masks = encoded(backbone, ["Al", "Barbara"]), some_masks(backbone, 2)
    every = ObjectiveConfig(head_tokens=backbone.model.config.vocab_size)
    exact = naive(backbone, masks, personas, ObjectiveConfig())
    assert_same(fast(backbone, masks, personas, MicroBatchConfig(every)), exact)
    some = MicroBatchConfig(ObjectiveConfig(head_tokens=16))
    examples = [TrainingExample(0, ("Al", n), row, 1 / 99) for n, row in enumerate(personas[0].train)]
    with BackboneRunner(backbone) as runner:
        teacher = TeacherCache(head_tokens=16)
        teacher.collect(runner, personas[0].prefixes[0], examples, some)
        vocabulary = teacher.vocabulary(runner, plan(runner, examples, personas[0].prefixes, some)[0][0])
        found, losses = mask_gradient(runner, masks[:1], personas[0].prefixes, examples, some, teacher)
        assert mask_losses(runner, masks[:1], personas[0].prefixes, examples, some, teacher).total > 0
    assert vocabulary is not None
    assert 16 < len(vocabulary.ids_V) < 256
    assert losses.total > 0
    assert F.cosine_similarity(found[0].flatten(), exact[1][0].flatten(), dim=0) > 0.8


@pytest.mark.parametrize("names", [["Ann"], ["Al", "Barbara"]])
def test_a_sliding_window_shorter_than_the_prompt(tmp_path, names):
    backbone = tiny(tmp_path, "mistral", sliding_window=24)
    personas, masks = encoded(backbone, names), some_masks(backbone, len(names))
    assert_same(fast(backbone, masks, personas, MicroBatchConfig(BOTH)), naive(backbone, masks, personas, BOTH))


def test_a_rope_that_turns_differently_in_long_prompts(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
    backbone = tiny(tmp_path, "phi3", rope_parameters=rope, original_max_position_embeddings=100)
    personas, masks = encoded(backbone, ["Ann"]), some_masks(backbone, 1)
    lengths = [len(personas[0].prefixes[0]) + len(row.tokens) for row in personas[0].train]
    assert min(lengths) < 100 < max(lengths), lengths
    assert_same(fast(backbone, masks, personas, MicroBatchConfig(BOTH)), naive(backbone, masks, personas, BOTH))


def test_chunks_of_logits_and_small_passes_change_nothing(tmp_path):
    backbone = tiny(tmp_path)
    personas, masks = encoded(backbone, ["Ann"]), some_masks(backbone, 1)
    small = MicroBatchConfig(BOTH.model_copy(update={"logits_chunk": 7}), micro_batch_tokens=80)
    assert_same(fast(backbone, masks, personas, small), naive(backbone, masks, personas, BOTH))


def test_recomputed_layers_give_the_same_gradient(tmp_path):
    backbone = tiny(tmp_path)
    personas, masks = encoded(backbone, ["Ann", "Bob"]), some_masks(backbone, 2)
    plain = fast(backbone, masks, personas, MicroBatchConfig(BOTH))
    assert_same(fast(backbone, masks, personas, MicroBatchConfig(BOTH), checkpoint_layers=True), plain, 1e-6)


def test_bfloat16_gives_nearly_the_gradient_of_float32(tmp_path):
    exact = tiny(tmp_path)
    coarse = load_backbone(BackboneConfig(path=str(tmp_path), dtype="bfloat16"), deepspeed=False)
    personas, masks = encoded(exact, ["Ann"]), some_masks(exact, 1)
    loss, grad = fast(coarse, masks, personas, MicroBatchConfig(PAPER))
    wanted_loss, wanted = fast(exact, masks, personas, MicroBatchConfig(PAPER))
    assert grad.dtype == torch.float32
    assert torch.allclose(loss, wanted_loss, rtol=0.02)
    assert F.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("family", [*FAMILIES, *SCALED_HEADS])
def test_body_and_head_apart_are_the_whole_model(tmp_path, family):
    backbone = tiny(tmp_path, family)
    with BackboneRunner(backbone) as runner:
        runner.check_head()


def test_a_head_that_does_more_is_refused(tmp_path):
    backbone = tiny(tmp_path)
    backbone.model.lm_head.register_forward_hook(lambda module, inputs, out: out if inputs[0].ndim == 2 else -out)
    with BackboneRunner(backbone) as runner, pytest.raises(BackboneError, match="logits are not its output layer"):
        runner.check_head()


def test_cross_entropy_alone_is_the_papers_objective(tmp_path):
    backbone = tiny(tmp_path)
    personas, masks = encoded(backbone, ["Ann"]), some_masks(backbone, 1)
    assert_same(fast(backbone, masks, personas, MicroBatchConfig(PAPER)), naive(backbone, masks, personas, PAPER))


def test_top_logits_of_the_whole_vocabulary_are_all_logits(tmp_path):
    backbone = tiny(tmp_path)
    personas, masks = encoded(backbone, ["Ann"]), some_masks(backbone, 1)
    top = BOTH.model_copy(update={"top_logits": backbone.model.config.vocab_size - 1})
    assert_same(fast(backbone, masks, personas, MicroBatchConfig(top)), naive(backbone, masks, personas, BOTH), 1e-4)
