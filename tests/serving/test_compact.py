"""Gathered FFN weights in a real engine: the same greedy tokens, on fewer channels."""

import dataclasses

import pytest
import torch

pytest.importorskip("vllm", reason="vllm has an environment of its own: make test-serving")

from test_vllm_plugin import QUESTIONS, generate, start, stats, stop


@pytest.fixture(scope="module")
def engine(run):
    engine = start(run.backbone, compact=2)
    yield engine
    stop(engine)


def with_core(run, name):
    """Keeps the first half of the channels, as everybody, and a tenth of its own."""
    mask = run.mask(name, ratio=0.9)
    keep_LI = mask.keep_LI.clone()
    keep_LI[:, : keep_LI.shape[1] // 2] = True
    return dataclasses.replace(mask, keep_LI=keep_LI)


def check(run, engine, masks):
    rows = [(mask, run.prompt("somebody", question)) for question in QUESTIONS for mask in masks]
    answers = generate(engine, rows, tokens=24)
    assert all(run.is_greedy(mask, prompt, answer) for (mask, prompt), (answer, _) in zip(rows, answers, strict=True))


def test_one_persona_runs_on_its_own_channels(run, engine):
    before = stats(engine)
    check(run, engine, [run.mask("alone", ratio=0.5)])
    after = stats(engine)
    assert after["compact_steps"] > before["compact_steps"]
    kept = sum(run.mask("alone", ratio=0.5).metadata.kept)
    assert after["compact_bytes"] == 3 * 4 * kept * run.plain.config.hidden_size


def test_personas_with_a_common_core_share_one_gathered_set(run, engine):
    before = stats(engine)
    masks = [with_core(run, f"core-{number}") for number in range(4)]
    union = torch.stack([mask.keep_LI for mask in masks]).any(0)
    assert 0.6 < union.float().mean() < 0.8
    check(run, engine, masks)
    check(run, engine, masks[:2])
    after = stats(engine)
    assert after["compact_gathers"] == before["compact_gathers"] + 1
    assert after["compact_steps"] > before["compact_steps"] + 20


def test_sets_leave_when_others_come(run, engine):
    for number in range(4):
        check(run, engine, [run.mask(f"guest-{number}", ratio=0.5)])
    assert stats(engine)["compact_sets"] == 2


def test_what_would_not_get_smaller_and_what_has_no_mask_run_on_the_whole_backbone(run, engine):
    before = stats(engine)
    check(run, engine, [run.mask(f"wide-{number}", ratio=0.5) for number in range(6)])
    check(run, engine, [None, run.mask("alone", ratio=0.5)])
    assert stats(engine)["compact_gathers"] == before["compact_gathers"]
