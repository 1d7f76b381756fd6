import time

import pytest
import torch
from tiny_models import persona_data

from persona_pruner.config.schema import LearningConfig, SchedulerConfig, StoppersConfig
from persona_pruner.learning.encoding import EncodedData, EncodedRow
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.learning.persona_training import PersonaTraining
from persona_pruner.learning.stoppers import StopReason


def training(**learning):
    config = LearningConfig(rows_per_step=4, **learning)
    rows = tuple(EncodedRow((1, 2, 3, n), 2, prefix=n % 2) for n in range(4))
    encoded = EncodedData("Ann", ((7,), (8, 9)), rows, (), "sha")
    candidate = MaskCandidate(config, "Ann", torch.rand(2, 64), 64, 0.25, 0.1)
    return PersonaTraining(persona_data("Ann"), encoded, [candidate], 1.0), candidate, config


def test_a_step_has_one_slot_per_prefix_and_weights_that_sum_to_one():
    persona, candidate, _ = training()
    slots = list(persona.examples(candidate, 5))
    assert [prefix for prefix, _ in slots] == [(7,), (8, 9)]
    assert [{e.slot for e in examples} for _, examples in slots] == [{5}, {6}]
    assert all(persona.encoded.prefixes[e.row.prefix] == prefix for prefix, rows in slots for e in rows)
    assert sum(e.weight * e.row.answer for _, rows in slots for e in rows) == 1


def test_auto_climbs_while_the_loss_is_within_the_tolerance_and_then_steps_back():
    persona, candidate, config = training(ratio="auto", ratio_ladder=(0.25, 0.5, 0.75), ratio_tolerance=0.1)
    candidate.heldout = 1.05
    assert persona.goes_on(config, StopReason.STEPS)
    assert (candidate.ratio, candidate.step) == (0.5, 0)
    candidate.heldout = 2.0
    assert not persona.goes_on(config, StopReason.STEPS)
    assert candidate.ratio == 0.25
    assert persona.goes_on(config, None)


def test_out_of_time_is_a_limit_on_training_seconds():
    persona, candidate, config = training(stoppers=StoppersConfig(seconds=5))
    assert not persona.out_of_time(config)
    candidate.seconds = 6
    assert persona.out_of_time(config)


def test_checkpoints_are_due_after_steps_or_seconds():
    persona, candidate, _ = training()
    config = SchedulerConfig(checkpoint_steps=3, checkpoint_seconds=60)
    candidate.step = 2
    assert not persona.checkpoint_due(config)
    candidate.step = 3
    assert persona.checkpoint_due(config)
    persona.saved()
    candidate.step = 4
    assert not persona.checkpoint_due(config)
    persona.saved_time = time.monotonic() - 61
    assert persona.checkpoint_due(config)


def test_generic_text_has_its_share_of_rows_and_of_the_loss():
    persona, candidate, _ = training(objective={"generic": 0.25})
    persona.generic = EncodedData("", ((5,),), (EncodedRow((1, 2, 3), 1), EncodedRow((1, 2, 4), 2)), (), "generic")
    *own, (prefix, examples) = persona.examples(candidate, 0)
    assert (prefix, [e.slot for e in examples], len(examples)) == ((5,), [len(own)], 1)
    assert sum(e.weight * e.row.answer for e in examples) == pytest.approx(0.25)
    assert sum(len(rows) for _, rows in own) == 3
    assert sum(e.weight * e.row.answer for _, rows in own for e in rows) == pytest.approx(0.75)


def test_token_weights_make_the_loss_a_weighted_mean():
    persona, candidate, _ = training()
    persona.token_weights = [(0.5, float(n)) for n in range(4)]
    examples = [e for _, rows in persona.examples(candidate, 0) for e in rows]
    assert {e.token_weights for e in examples} == set(persona.token_weights)
    assert sum(e.weight * sum(e.token_weights) for e in examples) == pytest.approx(1)
