"""Conversations of all arms together; each arm replayed alone with the plain model is the oracle."""

import dataclasses

import pyarrow as pa
import pytest
from evaluated_run import QUESTIONS, description_of, make_run
from rich.console import Console
from test_answers import keeps, plain_answer, rows_of, task

from persona_pruner.config.evaluation import JudgeConfig, JudgePrompts
from persona_pruner.dataset import Row
from persona_pruner.evaluation import dialogues
from persona_pruner.evaluation.answers import SCHEMA
from persona_pruner.evaluation.asking import answer_task
from persona_pruner.evaluation.baselines import Baselines
from persona_pruner.evaluation.judge import inquiries
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.learning.persona_tokens import NOBODY


def talk(backbone, config, storage):
    one = task()
    one.digests.clear()
    one.digests.update(dialogues="d")
    answer_task(Baselines(backbone, config), storage, one)
    return rows_of(storage, "dialogues")


def decoded(backbone, tokens):
    return backbone.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_every_arm_has_the_conversation_that_the_plain_models_have(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    rows = talk(backbone, config, storage)
    assert [(row["turn"], row["number"]) for row in rows] == [(turn, 0) for turn in (1, 2, 3) for _ in range(6)]
    masks, unpruned = keeps(storage, backbone, config), (None, None)
    for arm, mask in masks.items():
        said, earlier = QUESTIONS[0], ()
        for row in (row for row in rows if row["arm"] == arm):
            assert row["question"] == said
            tokens, ended = plain_answer(backbone, config, *mask, said, earlier)
            assert (row["text"], row["ended"]) == (decoded(backbone, tokens), ended)
            one = Row(said, row["text"], ended or not row["text"], earlier)
            assert row["own_loss"] == pytest.approx(heldout_loss(backbone, config, description_of("ann"), [one], None))
            earlier = (*earlier, (said, row["text"]))
            lines = [f"{who}: {text}" for turn in earlier for who, text in zip(("You", "The other"), turn, strict=True)]
            prompt = "\n".join(lines) + " And now?"
            said = decoded(backbone, plain_answer(backbone, config, *unpruned, prompt, (), NOBODY)[0]) or "Go on."
    assert len({row["text"] for row in rows}) > 6


def test_a_conversation_that_gets_too_long_forgets_its_beginning(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    shortest = len("<bos><head>system</head>You are ann") + 90
    config = config.model_copy(update={"learning": config.learning.model_copy(update={"max_row_tokens": shortest})})
    assert {row["turn"] for row in talk(backbone, config, storage)} == {1, 2, 3}


def verdicts(rows, **scores):
    """Of a judge of consistency, by arm and turn."""
    asked = inquiries(
        rows, "Ada", JudgeConfig(model="m", aspects=("consistency",), pairs=("unpruned",)), JudgePrompts()
    )
    assert len(asked) == rows.num_rows
    named = {f"{one.verdict.arm}_{one.verdict.turn}": one.verdict for one in asked}
    return [dataclasses.replace(named[name], score=score) for name, score in scores.items()]


def test_the_table_has_means_over_personas_by_turn_and_arm():
    rows = pa.Table.from_pylist(
        [
            {"persona_id": "ada", "arm": arm, "number": 0, "turn": turn, "text": "Aye.", "rank": 1 if turn == 1 else 2,
             "own_loss": float(turn), "repetition": 0.0, "ended": True}
            for turn in (1, 2) for arm in ("unpruned", "own")
        ], SCHEMA,
    )  # fmt: skip
    others = rows.set_column(rows.schema.get_field_index("text"), "text", pa.array(["Nay."] * 4))
    judged = dialogues.by_turn(rows, verdicts(rows, own_1=80.0) + verdicts(others, own_2=20.0))
    assert dialogues.catalog_columns(judged) == {"dialogue_first": 0.5, "dialogue_judge": 80.0}
    document = dialogues.table([judged, dialogues.by_turn(rows, verdicts(rows, own_1=60.0))])
    assert document["columns"][:6] == ["turn", "arm", "personas", "first", "rank", "own_loss"]
    assert document["rows"][1] == [1, "own", 2, 1.0, 1.0, 1.0, 0.0, 1.0, 70.0, None]
    assert [row[:4] for row in document["rows"]] == [
        [1, "unpruned", 2, 1.0], [1, "own", 2, 1.0], [2, "unpruned", 2, 0.0], [2, "own", 2, 0.0]
    ]  # fmt: skip
    console = Console(width=80)
    with console.capture() as captured:
        console.print(dialogues.render(document))
    assert captured.get().splitlines()[-1].split() == ["own", "1.00", "0.00"]
