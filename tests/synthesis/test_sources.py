import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona_pruner.config.schema import SynthesisConfig
from persona_pruner.errors import SourceError
from persona_pruner.synthesis.sources import load_question_set, question_id

ROWS = [{"instruction": f"Question {n}?", "input": "", "output": f"Answer {n}."} for n in range(20)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*sources, **settings):
    return load_question_set(
        SynthesisConfig(sources=[s if isinstance(s, dict) else {"path": s} for s in sources], **settings)
    )


def fault(*sources, **settings):
    with pytest.raises(SourceError) as caught:
        load(*sources, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_format_gives_the_same_questions(tmp_path):
    jsonl = write(tmp_path / "q.jsonl", ROWS)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress((tmp_path / "q.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "q.parquet")
    lines = ["instruction,input,output", *(f"{r['instruction']},,{r['output']}" for r in ROWS)]
    (tmp_path / "q.csv").write_text("\n".join(lines))
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "a.jsonl", ROWS[:5])
    write(tmp_path / "d" / "b.jsonl", ROWS[5:])
    expected = load(jsonl)
    assert (expected[0].id, expected[0].text, expected[0].answer) == (
        question_id("Question 0?"),
        "Question 0?",
        "Answer 0.",
    )
    for other in ("q.jsonl.gz", "q.parquet", "q.csv", "d"):
        assert load(str(tmp_path / other)) == expected


def test_other_columns_input_and_missing_answers(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"ask": " Sum up. ", "text": "A long text."}])
    (question,) = load({"path": path, "question": "ask", "input": "text", "answer": None})
    assert (question.text, question.answer) == ("Sum up.\nA long text.", None)


def test_duplicates_go_whatever_their_white_space(tmp_path):
    path = write(tmp_path / "q.jsonl", [ROWS[0], {**ROWS[0], "instruction": " Question\n 0?"}, ROWS[1]])
    assert len(load(path)) == 2


def test_mix_follows_weights_and_is_the_same_every_time(tmp_path):
    one = write(tmp_path / "one.jsonl", ROWS)
    two = write(tmp_path / "two.jsonl", [{**row, "instruction": f"Other {row['instruction']}"} for row in ROWS])
    sources = ({"path": one, "weight": 3}, {"path": two})
    drawn = load(*sources, max_questions=8)
    assert sum(q.text.startswith("Question") for q in drawn) == 6
    assert drawn == load(*sources, max_questions=8)
    assert drawn != load(*sources, max_questions=8, seed=1)
    assert len(load(*sources, max_questions=30)) == 30


def test_bad_sources_are_one_line_each(tmp_path):
    path = write(tmp_path / "q.jsonl", ROWS)
    assert "no column 'ask'; found instruction, input, output" in fault({"path": path, "question": "ask"})
    assert "row 2: output is None" in fault(write(tmp_path / "null.jsonl", [ROWS[0], {**ROWS[1], "output": None}]))
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty" in fault(str(tmp_path / "empty.jsonl"))
    huge = write(tmp_path / "huge.jsonl", [{**ROWS[0], "instruction": "word " * 200_000}])
    assert "row 1: 999,999 characters" in fault(huge)
    (tmp_path / "broken.jsonl").write_text('{"instruction": ')
    assert "cannot be read" in fault(str(tmp_path / "broken.jsonl"))
    assert "no local file" in fault("nobody/no-such-data-set")
    (tmp_path / "more.csv").write_text("instruction,output\na,b\n")
    assert "needs files of one kind" in fault(str(tmp_path))
    assert "synthesis.sources is empty" in fault()


def test_sources_in_object_storage(bucket, tmp_path):
    """A file, and a prefix of several files; a file that changes is read anew."""
    local = write(tmp_path / "q.jsonl", ROWS)
    bucket.put("q.jsonl", (tmp_path / "q.jsonl").read_bytes())
    pq.write_table(pa.Table.from_pylist(ROWS[:5]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[5:]), tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        bucket.put(f"many/{name}", (tmp_path / name).read_bytes())
    assert load(f"{bucket.url}/q.jsonl") == load(f"{bucket.url}/many") == load(local)
    bucket.put("q.jsonl", json.dumps(ROWS[3]).encode())
    assert [q.text for q in load(f"{bucket.url}/q.jsonl")] == ["Question 3?"]
    assert "nothing is there" in fault(f"{bucket.url}/absent.jsonl")


def spoken(*texts, system=None):
    said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + said}


def test_of_a_conversation_the_last_question_is_asked_and_what_was_said_before_is_kept(tmp_path):
    rows = [
        spoken("Hello.", "Aye?", "Who are you?", "A fisher.", system="Be brief."),
        spoken("Who are you?", "Nobody."),
    ]
    first, second = load({"path": write(tmp_path / "c.jsonl", rows), "messages": "messages"})
    assert (first.text, first.answer, first.earlier) == ("Who are you?", "A fisher.", (("Hello.", "Aye?"),))
    assert (second.text, second.answer, second.earlier) == ("Who are you?", "Nobody.", ())
    assert first.id != second.id == question_id("Who are you?")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (spoken("Hello."), "has the roles user; user and assistant must take turns"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "has the roles of nobody"),
        (spoken("Hello.", " "), "has the roles user, assistant; user and assistant must take turns, each with a text"),
        ({"messages": "Hello."}, "is no list of objects with role and content"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_row(tmp_path, row, reason):
    path = write(tmp_path / "c.jsonl", [row])
    assert f"row 1: messages {reason}" in fault({"path": path, "messages": "messages"})
