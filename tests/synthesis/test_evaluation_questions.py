"""Questions of the evaluation are recognised however instruction and input are joined."""

import gzip
import json
from pathlib import Path

import pytest

from persona_pruner.config.load import check_config
from persona_pruner.errors import PersonaError
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.evaluation_questions import read_evaluation_questions
from persona_pruner.synthesis.sources import comparison_key, load_question_set

SHARED = Path(__file__).parents[3] / "shared" / "data"


def configuration(directory, sources=()):
    return check_config({"evaluation": {"questions": str(directory)}, "synthesis": {"sources": list(sources)}})


@pytest.fixture(params=["local", "s3"])
def questions(request, tmp_path):
    storage = open_storage(tmp_path) if request.param == "local" else request.getfixturevalue("bucket")
    storage.put("ada.json", json.dumps({"questions": ["What  now?", "Why?"]}).encode())
    storage.put("bo.txt", b"What now?\nWho?")
    storage.put("cy.json", b"{")
    return storage.url


def test_they_are_found_wherever_they_are(questions):
    config = check_config({"evaluation": {"questions": questions}})
    assert read_evaluation_questions(config, "ada") == {"What now?", "Why?"}
    assert read_evaluation_questions(config, "bo") == {"What now?", "Who?"}
    assert read_evaluation_questions(config, "dee") == set()
    with pytest.raises(PersonaError, match=r"cy\.json: not readable"):
        read_evaluation_questions(config, "cy")


@pytest.mark.parametrize(
    "question",
    [
        "Add up.\n\n### Input:\n1 and 2",
        "\nAdd up.\n 1  and 2\n",
        "Add up. [for] 1 and 2",
        {"instruction": "Add up.", "input": "1 and 2"},
    ],
)
def test_instruction_and_input_are_compared_and_not_their_join(tmp_path, question):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "ada.json").write_text(json.dumps([question]))
    rows = [("Add up.", "1 and 2"), ("Add up.", ""), ("Add up.", "1 and 3")]
    lines = [json.dumps({"instruction": i, "input": x, "output": ""}) + "\n" for i, x in rows]
    (tmp_path / "q.jsonl").write_text("".join(lines))
    config = configuration(tmp_path / "eval", [{"path": str(tmp_path / "q.jsonl"), "join": " [for] "}])
    question_set = load_question_set(config.synthesis)
    excluded = read_evaluation_questions(config, "ada")
    assert [q.key in excluded for q in question_set] == [True, False, False]
    assert question_set[0].text == "Add up. [for] 1 and 2"


@pytest.mark.skipif(not SHARED.exists(), reason="the published evaluation files are not on this machine")
def test_every_published_question_with_an_input_is_excluded_from_its_source():
    source = {"path": str(SHARED / "alpaca.jsonl.gz")}
    with gzip.open(source["path"], "rt", encoding="utf-8") as lines:
        known = {comparison_key(row["instruction"], row["input"]) for row in map(json.loads, lines)}
    config = configuration(SHARED / "eval", [source])
    with_input = excluded = 0
    for file in sorted((SHARED / "eval").glob("*.json")):
        keys = read_evaluation_questions(config, file.stem)
        for question in json.loads(file.read_text(encoding="utf-8"))["questions"]:
            if "### Input:" in question:
                instruction, _, extra = question.partition("### Input:")
                with_input += 1
                excluded += comparison_key(instruction, extra) in keys & known
    assert excluded == with_input > 50
