"""What is read back of a persona's stored rows."""

import io
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from persona_pruner.config.load import check_config
from persona_pruner.dataset import read_persona_data, uses_unfinished_answers
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage, read_parquet
from persona_pruner.synthesis.commit import DataRow, commit
from persona_pruner.synthesis.sources import Question, question_id

ADA = Persona("ada", "Ada, a pilot")
QUESTIONS = [Question(question_id(text), text, None) for text in (f"Question {n}?" for n in range(20))]


@pytest.fixture
def storage(tmp_path):
    """Twenty questions, every second answer cut off."""
    stored = open_storage(tmp_path)
    config = check_config({"synthesis": {"filter": {"min_answers": 1}}})
    outcomes = ["ok", "cut_off"] * 10
    rows = [DataRow(question, 0.5, outcomes[n], f"Aye, number {n} by the tide") for n, question in enumerate(QUESTIONS)]
    commit(config, stored, ADA, rows, "m")
    return stored


def test_cut_off_answers_are_left_out_or_marked_as_unfinished(storage):
    finished = read_persona_data(storage, ADA)
    every = read_persona_data(storage, ADA, unfinished=True)
    assert len(finished.train) + len(finished.heldout) == 10
    assert len(every.train) + len(every.heldout) == 20
    assert all(row.finished == (int(row.question.split()[1][:-1]) % 2 == 0) for row in every.train + every.heldout)
    assert set(finished.train) <= set(every.train)
    assert finished.sha256 != every.sha256


def test_distillation_learns_from_cut_off_answers_and_cross_entropy_alone_does_not():
    assert uses_unfinished_answers(check_config({}))
    paper = {"learning": {"objective": {"cross_entropy": 1, "distillation": 0}}}
    assert not uses_unfinished_answers(check_config(paper))


def test_no_data_is_told_with_what_to_do(storage):
    with pytest.raises(PersonaError, match="synthesize first"):
        read_persona_data(storage, Persona("bo", "Bo, a baker"))


def test_conversations_come_back_with_what_was_said_before_and_it_decides_the_digest(storage):
    plain = read_persona_data(storage, ADA, unfinished=True)
    talks = [replace(question, earlier=(("Hello.", "Aye?"),)) for question in QUESTIONS]
    config = check_config({})
    commit(config, storage, ADA, [DataRow(one, 0.5, "ok", "Aye, number one by the tide") for one in talks], "m")
    data = read_persona_data(storage, ADA)
    assert {row.earlier for row in data.train + data.heldout} == {(("Hello.", "Aye?"),)}
    assert data.sha256 != plain.sha256
    commit(config, storage, ADA, [DataRow(one, 0.5, "ok", "Aye, number one by the tide") for one in QUESTIONS], "m")
    assert read_persona_data(storage, ADA).sha256 != data.sha256


def test_rows_of_a_release_without_conversations_are_read(storage):
    key = keys.persona_data("ada")
    table = read_parquet(storage.get(key))
    stream = io.BytesIO()
    pq.write_table(table.drop_columns(["earlier"]), stream)
    before = read_persona_data(storage, ADA)
    storage.put(key, stream.getvalue())
    assert read_persona_data(storage, ADA) == before
