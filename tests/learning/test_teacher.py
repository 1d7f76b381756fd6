"""What is kept of the unpruned model, and the gradient of the divergence from it."""

import math

import pytest
import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.learning.batches import MicroBatchConfig, examples_by_prefix, plan
from persona_pruner.learning.encoding import encode
from persona_pruner.learning.teacher import TeacherCache, log_probabilities

CONFIG = tiny_config()


def test_kept_rows_are_the_unpruned_models_distributions(tmp_path):
    backbone = tiny(tmp_path)
    encoded = encode(backbone.tokenizer, CONFIG.prompt, persona_data("Ann", rows=4), 2048)
    settings = MicroBatchConfig.of(CONFIG, backbone.device)
    ((prefix, examples),) = examples_by_prefix(encoded)
    with BackboneRunner(backbone) as runner:
        teacher = TeacherCache()
        teacher.collect(runner, prefix, examples, settings)
        for micro_batch in plan(runner, examples, [prefix], settings)[0]:
            (hidden_ND,) = teacher.teacher_rows(micro_batch)
            kept = runner.logits(hidden_ND).split([e.row.answer for e in micro_batch.examples])
            for example, logits in zip(micro_batch.examples, kept, strict=True):
                ids = torch.tensor([[*prefix, *example.row.tokens]])
                plain = backbone.model(ids).logits[0, -example.row.answer - 1 : -1]
                assert torch.allclose(logits, plain, atol=1e-4)


def test_drawn_tokens_stand_for_all_others(tmp_path):
    backbone = tiny(tmp_path)
    encoded = encode(backbone.tokenizer, CONFIG.prompt, persona_data("Ann", rows=4), 2048)
    settings = MicroBatchConfig.of(CONFIG, backbone.device)
    with BackboneRunner(backbone) as runner:
        teacher = TeacherCache(head_tokens=32)
        teacher.collect_rows(runner, encoded, settings, numbers=[0, 2])
        assert set(teacher.rows) == {("Ann", 0), ("Ann", 2)}
        ((prefix, examples),) = examples_by_prefix(encoded, numbers=[0, 2])
        ((micro_batch, *_), _) = plan(runner, examples, [prefix], settings)
        tokens = teacher.vocabulary(runner, micro_batch)
    every = backbone.model.config.vocab_size
    assert len(tokens.ids_V) < every
    assert (tokens.log_count_V[torch.isin(tokens.ids_V, micro_batch.targets_N)] == 0).all()
    assert tokens.log_count_V.exp().sum().item() == pytest.approx(every)
    logq_V = log_probabilities(torch.zeros(len(tokens.ids_V)), tokens)
    assert logq_V.min().item() == pytest.approx(-math.log(every))


def test_top_logits_gradient_is_that_of_the_bucketed_divergence(tmp_path):
    backbone = tiny(tmp_path)
    logq = torch.randn(5, 40, dtype=torch.double, requires_grad=True)
    logp = torch.randn(5, 40, dtype=torch.double).log_softmax(-1)
    best = logp.topk(6)
    with BackboneRunner(backbone) as runner:
        teacher_probs, divergence = TeacherCache(6).compare(runner, best, slice(0, 5), logq.detach().log_softmax(-1))
    q = logq.log_softmax(-1)
    rest_p, rest_q = 1 - best.values.exp().sum(-1), 1 - q.gather(1, best.indices).exp().sum(-1)
    kl = (best.values.exp() * (best.values - q.gather(1, best.indices))).sum(-1) + rest_p * (rest_p / rest_q).log()
    kl.sum().backward()
    assert torch.allclose(divergence, kl.detach())
    assert torch.allclose(logq.grad, q.detach().exp() - teacher_probs)
