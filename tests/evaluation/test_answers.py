"""Answers of all arms come from one stream of mixed batches; the plain model, one answer at a time, is the oracle."""

import pytest
import torch
from evaluated_run import QUESTIONS, description_of, make_run
from tiny_models import persona_data

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.dataset import Row
from persona_pruner.errors import PersonaError
from persona_pruner.evaluation.asking import answer_task, missing
from persona_pruner.evaluation.baselines import Baselines, added_biases
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.evaluation.subject import ARMS, AnswerTask
from persona_pruner.evaluation.summary import read_answers
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys


def task(persona_id="ann", digest="d1", other="bo"):
    return AnswerTask(
        persona_id=persona_id, other_id=other, candidates=("bo", "cy"), global_key=keys.mask("cy"),
        digests={"answers": digest},
    )  # fmt: skip


def answer(backbone, config, storage, task):
    return answer_task(Baselines(backbone, config), storage, task)


def rows_of(storage, kind="answers"):
    return [row for table in read_answers(storage, kind=kind) for row in table.to_pylist()]


def keeps(storage, backbone, config):
    own, other, pooled = (Mask.from_bytes(storage.get(keys.mask(name)), name).keep_LI for name in ("ann", "bo", "cy"))
    baselines = Baselines(backbone, config)
    made = {name: baselines.mask(name, own.sum(1), None) for name in ("magnitude", "flap")}
    return {"unpruned": (None, None), "own": (own, None), "global": (pooled, None), "other": (other, None)} | made


def plain_answer(backbone, config, keep_LI, bias_LD, question, earlier=(), description=None):
    description = description or description_of("ann")
    prompt = persona_prefix(backbone.tokenizer, config.prompt, description)
    prompt += question_suffix(backbone.tokenizer, config.prompt, description, question, earlier)
    end = answer_tokens(backbone.tokenizer, "a")[-1]
    answer = []
    with ChannelMasks(backbone.model) as masks, added_biases(backbone, bias_LD), torch.no_grad():
        masks.set(keep_LI)
        while len(answer) < config.evaluation.answers.max_new_tokens:
            answer.append(backbone.model(torch.tensor([prompt + answer])).logits[0, -1].argmax().item())
            if answer[-1] == end:
                return answer[:-1], True
    return answer, False


def test_greedy_answers_of_every_arm_are_those_of_the_plain_model_under_its_mask(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    assert answer(backbone, config, storage, task()) == 12
    rows, arms = rows_of(storage), keeps(storage, backbone, config)
    for row in rows:
        tokens, ended = plain_answer(backbone, config, *arms[row["arm"]], row["question"])
        assert row["text"] == backbone.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert (row["tokens"], row["ended"]) == (len(tokens), ended)
    assert [(row["arm"], row["question"]) for row in rows] == [
        (arm, question) for arm in ("unpruned", "own", "global", "other", "flap", "magnitude") for question in QUESTIONS
    ]
    assert len({row["text"] for row in rows}) > 4
    assert {row["arm"]: row["mask"] for row in rows} == {
        "unpruned": "", "own": "ann", "global": "global", "other": "bo", "flap": "flap", "magnitude": "magnitude"
    }  # fmt: skip
    assert len({row["mask_sha256"] for row in rows}) == 6
    assert set(ARMS) > {row["arm"] for row in rows}


def test_each_answer_is_read_under_every_description_by_the_unpruned_backbone(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    answer(backbone, config, storage, task())
    rows = rows_of(storage)
    for row in rows:
        said = [Row(row["question"], row["text"], row["ended"] or not row["text"])]
        own, *others = (
            heldout_loss(backbone, config, description_of(name), said, None) for name in ("ann", "bo", "cy")
        )
        assert row["own_loss"] == pytest.approx(own, rel=1e-5)
        assert (row["rank"], row["candidates"]) == (1 + sum(loss <= own for loss in others), 3)
        assert (row["similarity"] == pytest.approx(1, abs=1e-5)) >= (row["arm"] == "unpruned")
    assert {row["rank"] for row in rows} != {1}


def test_the_same_answers_come_again_bit_for_bit_and_replace_those_of_another_digest(tmp_path):
    backbone, config, storage = make_run(tmp_path, temperature=0.9)
    answer(backbone, config, storage, task(digest="d1"))
    first = storage.get(keys.evaluation_rows("answers", "ann", "d1"))
    assert missing(storage, task(digest="d2")) == ["answers"]
    answer(backbone, config, storage, task(digest="d2"))
    assert storage.get(keys.evaluation_rows("answers", "ann", "d2")) == first
    assert missing(storage, task(digest="d2")) == []
    assert missing(storage, task(digest="d1")) == ["answers"]


def test_what_a_persona_lacks_is_told(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    (tmp_path / "questions" / "ann.json").unlink()
    with pytest.raises(PersonaError, match="no held-out question"):
        answer(backbone, config, storage, task())
    assert persona_data("ann").heldout
    assert rows_of(storage) == []
