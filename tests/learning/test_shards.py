"""Two real processes, each with half of the backbone (DeepSpeed ZeRO-3 over gloo), against one."""

import dataclasses
import multiprocessing
import socket
from typing import Any

import pytest
import torch
from test_objective import BOTH, assert_same, encoded, fast, naive, some_masks
from test_sensitivity import pairwise
from tiny_models import persona_data, save_tiny, tiny, tiny_config

from persona_pruner.backbone.load import World, load_backbone
from persona_pruner.config.load import check_config
from persona_pruner.dataset import PersonaData
from persona_pruner.learning.batches import MicroBatchConfig
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.methods.one_pass import OnePass
from persona_pruner.learning.outcome import Progress
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.manifest import Persona
from persona_pruner.masks.weight_mask import WeightMask
from persona_pruner.synthesis.rewrite.backbone import SelfRewriter
from persona_pruner.synthesis.rewrite.base import Request
from persona_pruner.synthesis.sensitivity import Sensitivity
from persona_pruner.synthesis.sources import Question, question_id

NAMES = ["Ann", "Barbara"]
FOREVER = 100_000
ONE_PASS = ("activation", "wanda", "sparsegpt", "contrastive_wanda")
PERSONAS = [Persona(name, f"{name}, a {'very ' * n}old sailor") for n, name in enumerate(("Ann", "Bo", "Cy"))]
QUESTIONS = ["Why?", "What do you do in the morning, when nobody looks?", "3 + 4?"]


def _rank(path: str, rank: int, size: int, port: int, queue: Any, steps: int) -> None:
    torch.set_num_threads(1)
    try:
        queue.put((rank, *_learn(path, World(rank, size, f"127.0.0.1:{port}", timeout_seconds=60), steps, queue)))
    except Exception as error:
        queue.put((rank, "error", repr(error)))


def _learn(path: str, world: World, steps: int, queue: Any) -> tuple[Any, ...]:
    from persona_pruner.evaluation.likelihood import heldout_loss

    config = tiny_config(path, steps=steps, rows_per_step=5, keep_scores=True)
    backbone = load_backbone(config.backbone, world)
    held = sum(getattr(p, "ds_tensor", p).numel() for p in backbone.model.parameters())
    data = [persona_data(name) for name in NAMES]
    gradient = _gradient(backbone) if steps != FOREVER else None
    scores = _scores(backbone) if steps != FOREVER else None
    answers = _answers(backbone) if steps != FOREVER else None
    one_pass = _one_pass(backbone, *data) if steps != FOREVER else None

    class Tell(TrainingCallbacks):
        def report(self, progress: Progress) -> None:
            if steps == FOREVER and progress.step == 3:
                queue.put("under way")

    outcomes = MaskTrainer(backbone, config).train(data, run_id="r", callbacks=Tell())
    loss = heldout_loss(backbone, config, data[0].description, data[0].heldout, None)
    arrays = [o.mask and (o.mask.keep_LI.numpy(), o.mask.scores_LI.numpy()) for o in outcomes]
    return held, arrays, loss, gradient, scores, answers, _in_bfloat16(path, world, data), one_pass


def _gradient(backbone: Any) -> tuple[Any, Any]:
    """Losses and gradient of one step, summed over the ranks."""
    masks = some_masks(backbone, len(NAMES))
    loss_P, grad_PLI = fast(backbone, masks, encoded(backbone, NAMES), MicroBatchConfig(BOTH))
    return backbone.all_reduce(loss_P).numpy(), backbone.all_reduce(grad_PLI).numpy()


def _scores(backbone: Any) -> list[Any]:
    asked = check_config({"backbone": {"path": "x"}, "synthesis": {"references": {"count": 2}, "tile_questions": 2}})
    return [scores.numpy() for _, scores in Sensitivity(backbone, asked, QUESTIONS, PERSONAS).tile(PERSONAS)]


def _answers(backbone: Any) -> list[Any]:
    """Two samples of each question, in batches that do not divide evenly over the ranks."""
    rewrite = {"samples_per_question": 2, "max_new_tokens": 12, "batch_size": 2}
    settings = check_config({"backbone": {"path": "x"}, "synthesis": {"rewrite": rewrite}})
    questions = [Question(question_id(text), text, None) for text in QUESTIONS[:2]]
    rewriter = SelfRewriter(backbone, settings)
    asked = [[Request(p, question, sample) for question in questions for sample in range(2)] for p in PERSONAS]
    return [rewriter.answers(requests) for requests in [*asked, asked[0][:1]]]


def _in_bfloat16(path: str, world: World, data: Any) -> list[tuple[float, int]]:
    """(held-out loss, channels kept) after some steps in bfloat16 with recomputed activations."""
    config = tiny_config(path, steps=3, rows_per_step=5, gradient_checkpointing=True)
    backbone = load_backbone(config.backbone.model_copy(update={"dtype": "bfloat16"}), world)
    outcomes = MaskTrainer(backbone, config).train(data, run_id="r")
    return [(o.mask.metadata.masked_loss, int(o.mask.keep_LI.sum())) for o in outcomes if o.mask]


def _one_pass(backbone: Any, own: PersonaData, opposed: PersonaData) -> list[Any]:
    """Bits of a mask by each of ONE_PASS; None on other ranks than 0."""
    found = []
    for method in ONE_PASS:
        methods = OnePass(backbone, tiny_config(method=method, ratio=0.5))
        (result,) = methods.train([dataclasses.replace(own, opposite=opposed)], run_id="r")
        mask = result.mask
        if isinstance(mask, WeightMask):
            found.append(torch.cat([mask.keep(name).flatten() for name in sorted(mask.packed)]).numpy())
        else:
            found.append(mask and mask.keep_LI.numpy())
    return found


def _world(path: Any, size: int, steps: int = 15) -> tuple[list[Any], Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    ranks = [spawn.Process(target=_rank, args=(str(path), r, size, port, queue, steps)) for r in range(size)]
    for process in ranks:
        process.start()
    return ranks, queue


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = save_tiny(tmp_path_factory.mktemp("tiny"))
    found = {}
    for size in (1, 2):
        ranks, queue = _world(path, size)
        found[size] = sorted([queue.get(timeout=400) for _ in range(size)], key=lambda answer: answer[0])
        for process in ranks:
            process.join(30)
    return found


def test_each_shard_holds_half_of_the_parameters(results):
    whole = results[1][0][1]
    assert [answer[1] for answer in results[2]] == [pytest.approx(whole / 2, rel=0.02)] * 2


def test_two_shards_learn_the_mask_of_one_and_rank_0_alone_has_it(results):
    assert results[2][1][2] == [None, None]
    for (one, one_scores), (two, two_scores) in zip(results[1][0][2], results[2][0][2], strict=True):
        assert (one == two).mean() >= 0.999
        assert abs(one_scores.astype(float) - two_scores).max() < 2e-3


def test_loss_and_gradient_of_one_and_two_shards_equal_the_plain_formula(results, tmp_path):
    backbone = tiny(tmp_path)
    expected = naive(backbone, some_masks(backbone, len(NAMES)), encoded(backbone, NAMES), BOTH)
    for answer in (results[1][0], *results[2]):
        assert_same(tuple(torch.from_numpy(part) for part in answer[4]), expected)


def test_sensitivity_of_one_and_two_shards_equals_the_pairwise_formula(results, tmp_path):
    backbone = tiny(tmp_path)
    settings = check_config({"backbone": {"path": "x"}})
    for answer in (results[1][0], *results[2]):
        for number, persona in enumerate(PERSONAS):
            others = [p for p in PERSONAS if p != persona][:2]
            expected = [pairwise(backbone, settings, question, persona, others) for question in QUESTIONS]
            assert answer[5][number].tolist() == pytest.approx(expected, abs=1e-5)


def test_answers_of_two_shards_are_those_of_one_on_every_rank(results):
    whole = results[1][0][6]
    assert len({answer.text for answers in whole for answer in answers}) > len(PERSONAS)
    assert [answer[6] for answer in results[2]] == [whole, whole]


def test_bfloat16_and_recomputed_activations_work_on_shards(results):
    (two,), (one,) = ([answer[7] for answer in results[size] if answer[7]] for size in (2, 1))
    assert [kept for _, kept in two] == [kept for _, kept in one] == [3 * 32] * 2
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in one], rel=0.02)


@pytest.mark.parametrize("number", range(len(ONE_PASS)), ids=ONE_PASS)
def test_a_method_without_training_chooses_the_same_on_two_shards(results, number):
    one, two = (results[size][0][8][number] for size in (1, 2))
    assert (one == two).mean() >= 0.999
    assert 0.4 < one.mean() < 0.6
    assert results[2][1][8][number] is None


def test_the_heldout_loss_is_the_same_on_every_rank(results):
    losses = [answer[3] for answer in results[2]]
    assert losses[0] == losses[1] == pytest.approx(results[1][0][3], rel=1e-5)


def test_a_killed_shard_is_an_error_of_the_other_within_30_seconds(tmp_path):
    ranks, queue = _world(save_tiny(tmp_path), 2, FOREVER)
    try:
        assert queue.get(timeout=400) == "under way"
        ranks[1].kill()
        answer = queue.get(timeout=30)
        while answer == "under way":
            answer = queue.get(timeout=30)
        assert answer[:2] == (0, "error")
    finally:
        for process in ranks:
            process.kill()
