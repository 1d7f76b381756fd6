"""What a persona learns does not depend on interruptions, on company, or on the number of shards."""

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import persona_data, save_tiny, tiny, tiny_config

from persona_pruner.backbone.load import load_backbone
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.outcome import Progress, TrainingStatus
from persona_pruner.learning.stoppers import StopReason
from persona_pruner.learning.trainer import MaskTrainer


class Recorder(TrainingCallbacks):
    """Keeps what the trainer tells; says stop once `stop_after` steps were asked about."""

    def __init__(self, stop_after: int = 0, restore: Any = None, warm: Any = None) -> None:
        self.left, self.restore, self.warm = stop_after, restore or {}, warm or {}
        self.checkpoints: dict[str, bytes] = {}
        self.writes: list[str] = []
        self.progress: list[Progress] = []

    def read_checkpoint(self, persona_id: str) -> bytes | None:
        return self.restore.get(persona_id)

    def write_checkpoint(self, persona_id: str, data: bytes) -> None:
        self.checkpoints[persona_id] = data
        self.writes.append(persona_id)

    def warm_scores(self, persona_id: str) -> torch.Tensor | None:
        return self.warm.get(persona_id)

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left == 0

    def report(self, progress: Progress) -> None:
        self.progress.append(progress)


def learn(backbone: Any, data: list[PersonaData], **options: Any) -> tuple[list[Any], dict[str, bytes]]:
    learning = options.pop("learning", {})
    recorder = Recorder(**options)
    trainer = MaskTrainer(backbone, tiny_config(**{"keep_scores": True, **learning}))
    return trainer.train(data, run_id="run", callbacks=recorder), recorder.checkpoints


def final_scores(backbone: Any, data: list[PersonaData], steps: int, **learning: Any) -> dict[str, torch.Tensor]:
    """Full-precision scores after `steps`, out of the checkpoints of a stopped run."""
    from safetensors.torch import load

    _, kept = learn(backbone, data, stop_after=steps, learning={"steps": 90, **learning})
    return {name: load(blob)["0.scores"] for name, blob in kept.items()}


def test_training_lowers_the_loss_and_fills_the_mask_in(tmp_path):
    backbone, recorder = tiny(tmp_path), Recorder()
    trainer = MaskTrainer(backbone, tiny_config(keep_scores=True, steps=60, init="zeros"))
    (outcome,) = trainer.train([persona_data("Ann")], run_id="run", callbacks=recorder)
    seen = recorder.progress
    assert outcome.status == "done"
    assert outcome.reason is StopReason.STEPS
    assert outcome.mask.keep_LI.sum(1).tolist() == [32, 32, 32]
    metadata = outcome.mask.metadata
    assert (metadata.persona_id, metadata.kept, metadata.steps, metadata.run_id) == ("Ann", (32, 32, 32), 60, "run")
    assert metadata.data_sha256 == "sha-Ann"
    assert metadata.backbone_fingerprint == backbone.fingerprint
    assert metadata.unpruned_loss is not None
    assert metadata.masked_loss is not None
    assert sum(p.loss for p in seen[-5:]) < 0.8 * sum(p.loss for p in seen[:5])
    assert [p.step for p in seen] == list(range(1, 61))
    assert outcome.curve.training == pytest.approx([p.loss for p in seen], abs=1e-5)
    assert [step for step, _ in outcome.curve.heldout] == [10, 20, 30, 40, 50, 60]
    assert outcome.curve.heldout[-1][1] == pytest.approx(metadata.masked_loss, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "ste"},
        {"method": "gumbel"},
        {"method": "soft_topk"},
        {"objective": {"persona_tokens": 1.0, "generic": 0.25, "foreign": 0.25, "head_tokens": 64}},
    ],
    ids=lambda changes: changes.get("method", "objective"),
)
def test_a_restored_run_ends_bit_identical_to_an_uninterrupted_one(tmp_path, changes):
    backbone, learning = tiny(tmp_path), {"steps": 50, **changes}
    (whole,), _ = learn(backbone, [persona_data("Ann")], learning=learning)
    (paused,), kept = learn(backbone, [persona_data("Ann")], learning=learning, stop_after=23)
    assert (paused.status, paused.step, paused.mask) == ("paused", 23, None)
    torch.manual_seed(99)
    (resumed,), _ = learn(backbone, [persona_data("Ann")], learning=learning, restore=kept)
    assert resumed.mask.to_bytes() == whole.mask.to_bytes()
    assert resumed.curve.to_bytes() == whole.curve.to_bytes()


def test_a_checkpoint_of_other_data_or_broken_bytes_is_not_used(tmp_path):
    backbone = tiny(tmp_path)
    (whole,), _ = learn(backbone, [persona_data("Ann")])
    _, kept = learn(backbone, [dataclasses.replace(persona_data("Ann"), sha256="old")], stop_after=7)
    for blob in (kept["Ann"], kept["Ann"][:50], b""):
        (again,), _ = learn(backbone, [persona_data("Ann")], restore={"Ann": blob})
        assert again.mask.to_bytes() == whole.mask.to_bytes()


def _in_process(path: str, queue: Any) -> None:
    torch.set_num_threads(1)
    backbone = load_backbone(tiny_config(path).backbone, deepspeed=False)
    queue.put({name: z.numpy() for name, z in final_scores(backbone, [persona_data("Ann")], 50).items()})


def test_two_processes_get_the_same_scores_to_the_last_bit(tmp_path):
    save_tiny(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    found = []
    for _ in range(2):
        queue = spawn.Queue()
        process = spawn.Process(target=_in_process, args=(str(tmp_path), queue))
        process.start()
        found.append(queue.get(timeout=120))
        process.join(30)
    assert (found[0]["Ann"] == found[1]["Ann"]).all()


def test_together_is_alone_and_a_poisoned_persona_harms_nobody(tmp_path):
    backbone = tiny(tmp_path)
    names = ["Al", "Barbara", "Cyril", "Doe", "Eleanor", "Fay", "Gus", "Hildegard"]
    data = [persona_data(name, rows=6 + len(name)) for name in names]
    alone = {d.persona_id: final_scores(backbone, [d], 20)[d.persona_id] for d in data}
    together = final_scores(backbone, data, 20)
    for name in names:
        assert (together[name] - alone[name]).abs().max() < 1e-5
    poison = {name: scores if name != "Doe" else scores * float("nan") for name, scores in alone.items()}
    results, _ = learn(backbone, data, warm=poison, learning={"init": "mean:a,b", "steps": 20})
    bad = results[3]
    assert (bad.persona_id, bad.status, bad.cause) == ("Doe", "failed", "not_finite")
    healthy, _ = learn(backbone, data[:3], warm=alone, learning={"init": "mean:a,b", "steps": 20})
    for one, other in zip(results[:3], healthy, strict=True):
        assert torch.equal(one.mask.keep_LI, other.mask.keep_LI)


def test_a_loss_that_is_not_finite_in_the_middle_stops_one_persona_only(tmp_path):
    """Not reachable with finite weights: the poison is put into the gradient of one slot."""
    from persona_pruner.learning import trainer as module

    backbone, plain, calls = tiny(tmp_path), module.mask_gradient, []

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        grad, losses = plain(*args, **kwargs)
        calls.append(len(grad))
        if len(calls) == 4:
            grad[1] = float("nan")
        return grad, losses

    module.mask_gradient = poisoned
    try:
        results, _ = learn(backbone, [persona_data("Ann"), persona_data("Bob"), persona_data("Cyril")])
    finally:
        module.mask_gradient = plain
    assert results[1].cause == "not_finite"
    assert calls == [3] * 4 + [2] * 16
    (alone,), _ = learn(backbone, [persona_data("Ann")])
    assert (results[0].mask.scores_LI.float() - alone.mask.scores_LI.float()).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("rows", "learning", "cause"),
    [((), {}, "empty"), ((Row("why", "so " * 400),), {"max_row_tokens": 200}, "row_too_long")],
)
def test_bad_rows_are_an_error_of_that_persona(tmp_path, rows, learning, cause):
    bad = dataclasses.replace(persona_data("Bad"), train=rows)
    results, _ = learn(tiny(tmp_path), [bad, persona_data("Ann")], learning=learning)
    assert results[0].cause == cause
    assert results[1].status == "done"


def test_auto_takes_the_largest_ratio_within_the_tolerance(tmp_path):
    backbone, ladder = tiny(tmp_path), [0.25, 0.5, 0.75]
    learning = {"ratio": "auto", "ratio_ladder": ladder, "steps": 10}
    (generous,), _ = learn(backbone, [persona_data("Ann")], learning={**learning, "ratio_tolerance": 50.0})
    assert generous.mask.metadata.ratio == 0.75
    (strict,), _ = learn(backbone, [persona_data("Ann")], learning={**learning, "ratio_tolerance": 0.0})
    assert strict.mask.metadata.ratio == 0.25
    (_,), kept = learn(backbone, [persona_data("Ann")], learning={**learning, "ratio_tolerance": 50.0},
                       stop_after=14)  # fmt: skip
    (resumed,), _ = learn(backbone, [persona_data("Ann")], learning={**learning, "ratio_tolerance": 50.0}, restore=kept)
    assert resumed.mask.to_bytes() == generous.mask.to_bytes()


def test_halving_drops_what_learns_nothing_and_ends_with_one_mask(tmp_path):
    backbone = tiny(tmp_path)
    start = {"steps": 30, "objective": {"cross_entropy": 1.0, "distillation": 0.0}}
    learning = {**start, "halving": {"learning_rates": [1e-9, 0.03, 1e-8], "rung_steps": 8}}
    (halved,), _ = learn(backbone, [persona_data("Ann")], learning=learning)
    (useful,), _ = learn(backbone, [persona_data("Ann")], learning={**start, "learning_rate": 0.03})
    assert torch.equal(halved.mask.keep_LI, useful.mask.keep_LI)
    _, kept = learn(backbone, [persona_data("Ann")], learning=learning, stop_after=11)
    (resumed,), _ = learn(backbone, [persona_data("Ann")], learning=learning, restore=kept)
    assert resumed.mask.to_bytes() == halved.mask.to_bytes()


def test_stoppers_end_a_run_early(tmp_path):
    backbone = tiny(tmp_path)
    often = {"steps": 50, "evaluate_every": 2}
    flat = {**often, "learning_rate": 1e-9}
    (plateau,), _ = learn(backbone, [persona_data("Ann")], learning={**flat, "stoppers": {"plateau_evaluations": 2}})
    assert (plateau.reason, plateau.step) == ("plateau", 6)
    (stable,), _ = learn(backbone, [persona_data("Ann")], learning={**flat, "stoppers": {"stability": 0.0}})
    assert (stable.reason, stable.step) == ("stable", 4)
    (late,), _ = learn(backbone, [persona_data("Ann")], learning={**often, "stoppers": {"seconds": 1e-6}})
    assert (late.reason, late.step, late.status) == ("seconds", 2, "done")


def test_warm_start_needs_scores_of_this_backbone(tmp_path):
    results, _ = learn(tiny(tmp_path), [persona_data("Ann")], learning={"init": "persona:Bob"})
    assert results[0].cause == "no_warm_scores"
    wrong = {"Ann": torch.zeros(1, 2)}
    results, _ = learn(tiny(tmp_path), [persona_data("Ann")], learning={"init": "persona:Bob"}, warm=wrong)
    assert "shape" in results[0].message


def test_checkpoints_come_at_the_steps_asked_for(tmp_path):
    config = tiny_config(steps=20)
    config = config.model_copy(update={"scheduler": config.scheduler.model_copy(update={"checkpoint_steps": 6})})
    recorder = Recorder()
    trainer = MaskTrainer(tiny(Path(tmp_path)), config)
    (outcome,) = trainer.train([persona_data("Ann")], run_id="r", callbacks=recorder)
    assert outcome.status is TrainingStatus.DONE
    assert recorder.writes == ["Ann"] * 3


def test_steps_may_be_passes_over_the_rows(tmp_path):
    learning = {"passes": 2.5, "rows_per_step": 5, "steps": 99}
    (twelve, three), _ = learn(tiny(tmp_path), [persona_data("Ann"), persona_data("Bob", rows=3)], learning=learning)
    assert (twelve.step, three.step) == (6, 3)
