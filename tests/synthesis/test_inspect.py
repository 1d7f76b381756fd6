import json
import subprocess
import sys
from pathlib import Path

from persona_pruner.config.load import check_config
from persona_pruner.manifest import Persona
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.commit import DataRow, commit
from persona_pruner.synthesis.sources import Question, question_id

COMMAND = Path(sys.executable).parent / "persona-pruner"


def store(directory):
    texts = [f"Question {n}?" for n in range(12)]
    questions = [Question(question_id(text), text, f"Plain {n}.") for n, text in enumerate(texts)]
    other = Question(question_id("1 + 1?"), "1 + 1?", "2")
    settings = check_config({"backbone": {"path": "x"}})
    rows = [DataRow(q, 0.9 - n / 100, "ok", f"Aye, {n} by the tide.") for n, q in enumerate(questions)]
    commit(settings, open_storage(directory), Persona("ada", "Ada, a pilot"), [*rows, DataRow(other, 0.01)], "m")


def inspect(directory, *words):
    return subprocess.run([COMMAND, "inspect", directory, *words], capture_output=True, text=True)


def test_shows_what_reveals_a_persona_most_and_least_and_answers_before_and_after(tmp_path):
    store(tmp_path)
    done = inspect(tmp_path, "--persona", "ada", "--count", "2")
    assert done.returncode == 0, done.stderr
    for told in ("0.9000", "Question 0?", "0.0100", "1 + 1?", "Plain 1.", "Aye, 1 by the tide."):
        assert told in done.stdout
    assert "Question 5?" not in done.stdout
    found = json.loads(inspect(tmp_path, "--persona", "ada", "--json").stdout)
    assert found["least_sensitive"][-1]["question"] == "1 + 1?"
    assert found["outcomes"] == {"not_selected": 1, "ok": 12}
    assert found["train"] + found["heldout"] == 12


def test_a_persona_without_data_is_one_line(tmp_path):
    store(tmp_path)
    done = inspect(tmp_path, "--persona", "bo")
    assert done.returncode == 2
    assert "synthesize first" in done.stderr
    assert len(done.stderr.splitlines()) == 1
