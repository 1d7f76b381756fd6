import pyarrow.parquet as pq
import pytest

from persona_pruner.config.load import check_config
from persona_pruner.dataset import SCHEMA, read_persona_data, split_of
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.commit import DataRow, commit
from persona_pruner.synthesis.sources import Question, question_id

QUESTIONS = [Question(question_id(text), text, "Plain answer.") for text in (f"Question {n}?" for n in range(12))]
ADA = Persona("ada", "Ada, a pilot")
CONFIG = check_config({"synthesis": {"filter": {"min_answers": 2, "min_words": 1}}})


def rows(outcomes):
    return [DataRow(q, 0.5, outcome, "By the tide.") for q, outcome in zip(QUESTIONS, outcomes, strict=True)]


def test_rows_come_back_as_training_data_and_rejected_ones_stay_in_the_file(tmp_path):
    storage = open_storage(tmp_path)
    asked = [*rows(["ok"] * 10 + ["empty", "echo"])]
    assert commit(CONFIG, storage, ADA, asked, "m") == {"echo": 1, "empty": 1, "ok": 10}
    first = storage.get(keys.persona_data("ada"))
    commit(CONFIG, storage, ADA, asked, "m")
    assert storage.get(keys.persona_data("ada")) == first
    data = read_persona_data(storage, ADA)
    assert len(data.train) + len(data.heldout) == 10
    table = pq.read_table(tmp_path / keys.persona_data("ada"))
    assert table.column_names == SCHEMA.names
    assert table["filter"].to_pylist()[10:] == ["empty", "echo"]
    split = dict(zip(table["question_id"].to_pylist(), table["split"].to_pylist(), strict=True))
    assert split == {q.id: split_of(q.id, 0.25) for q in QUESTIONS}


def test_too_few_answers_are_the_personas_error_with_counts(tmp_path):
    with pytest.raises(PersonaError, match=r"1 usable answers.*assistant 11, ok 1") as caught:
        commit(CONFIG, open_storage(tmp_path), ADA, rows(["assistant"] * 11 + ["ok"]), "m")
    assert caught.value.cause == "few_answers"
    assert not list(tmp_path.rglob("*.parquet"))


def test_cut_off_answers_count_where_the_objective_is_distillation(tmp_path):
    cut = rows(["cut_off"] * 12)
    assert commit(CONFIG, open_storage(tmp_path), ADA, cut, "m") == {"cut_off": 12}
    objective = {"learning": {"objective": {"cross_entropy": 1, "distillation": 0}}}
    paper = check_config(CONFIG.model_dump() | {"learning": objective["learning"]})
    with pytest.raises(PersonaError, match="0 usable answers"):
        commit(paper, open_storage(tmp_path), ADA, cut, "m")
