"""Answers of all arms come from one stream of mixed batches; the plain model, one answer at a time, is the oracle."""

import pytest
import torch
from evaluated_run import QUESTIONS, description_of, make_run
from tiny_models import persona_data

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.dataset import Row
from persona_pruner.errors import PersonaError
from persona_pruner.evaluation.answers import AnswerTask, answer_task, is_answered
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.evaluation.summary import read_answers
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.training_free import magnitude
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys


def task(persona_id="ann", digest="d1", other="bo"):
    return AnswerTask(
        persona_id=persona_id, other_id=other, candidates=("bo", "cy"), global_key=keys.mask("cy"), digest=digest
    )


def rows_of(storage):
    return [row for table in read_answers(storage) for row in table.to_pylist()]


def keeps(storage, backbone):
    own, other, pooled = (Mask.from_bytes(storage.get(keys.mask(name)), name).keep_LI for name in ("ann", "bo", "cy"))
    baseline = topk_mask(magnitude(backbone), own.sum(1))
    return {"unpruned": None, "own": own, "global": pooled, "other": other, "baseline": baseline}


def plain_answer(backbone, config, keep_LI, question):
    prompt = persona_prefix(backbone.tokenizer, config.prompt, description_of("ann"))
    prompt += question_suffix(backbone.tokenizer, config.prompt, description_of("ann"), question)
    end = answer_tokens(backbone.tokenizer, "a")[-1]
    answer = []
    with ChannelMasks(backbone.model) as masks, torch.no_grad():
        masks.set(keep_LI)
        while len(answer) < config.evaluation.answers.max_new_tokens:
            answer.append(backbone.model(torch.tensor([prompt + answer])).logits[0, -1].argmax().item())
            if answer[-1] == end:
                return answer[:-1], True
    return answer, False


def test_greedy_answers_of_every_arm_are_those_of_the_plain_model_under_its_mask(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    assert answer_task(backbone, config, storage, task()) == 10
    rows = rows_of(storage)
    for row in rows:
        tokens, ended = plain_answer(backbone, config, keeps(storage, backbone)[row["arm"]], row["question"])
        assert row["text"] == backbone.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert (row["tokens"], row["ended"]) == (len(tokens), ended)
    assert [(row["arm"], row["question"]) for row in rows] == [
        (arm, question) for arm in ("unpruned", "own", "global", "other", "baseline") for question in QUESTIONS
    ]
    assert len({row["text"] for row in rows}) > 4
    assert {row["arm"]: row["mask"] for row in rows} == {
        "unpruned": "", "own": "ann", "global": "global", "other": "bo", "baseline": "magnitude"
    }  # fmt: skip
    assert len({row["mask_sha256"] for row in rows}) == 5


def test_each_answer_is_read_under_every_description_by_the_unpruned_backbone(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    answer_task(backbone, config, storage, task())
    rows = rows_of(storage)
    for row in rows:
        answer = [Row(row["question"], row["text"], row["ended"] or not row["text"])]
        own, *others = (
            heldout_loss(backbone, config, description_of(name), answer, None) for name in ("ann", "bo", "cy")
        )
        assert row["own_loss"] == pytest.approx(own, rel=1e-5)
        assert (row["rank"], row["candidates"]) == (1 + sum(loss <= own for loss in others), 3)
        assert (row["similarity"] == pytest.approx(1, abs=1e-5)) >= (row["arm"] == "unpruned")
    assert {row["rank"] for row in rows} != {1}


def test_the_same_answers_come_again_bit_for_bit_and_replace_those_of_another_digest(tmp_path):
    backbone, config, storage = make_run(tmp_path, temperature=0.9)
    answer_task(backbone, config, storage, task(digest="d1"))
    first = storage.get(keys.evaluation_answers("ann", "d1"))
    assert not is_answered(storage, task(digest="d2"))
    answer_task(backbone, config, storage, task(digest="d2"))
    assert storage.get(keys.evaluation_answers("ann", "d2")) == first
    assert is_answered(storage, task(digest="d2"))
    assert not is_answered(storage, task(digest="d1"))


def test_what_a_persona_lacks_is_told(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    (tmp_path / "questions" / "ann.json").unlink()
    with pytest.raises(PersonaError, match="no held-out question"):
        answer_task(backbone, config, storage, task())
    assert persona_data("ann").heldout
    assert rows_of(storage) == []
