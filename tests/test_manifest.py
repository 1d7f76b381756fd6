import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona_pruner.errors import ManifestError
from persona_pruner.manifest import Persona, check_opposites, read_manifest

GOOD = {"id": "ada", "description": "Ada pilots a ferry."}


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def faults(url):
    with pytest.raises(ManifestError) as caught:
        read_manifest(url)
    return str(caught.value).splitlines()


def test_reads_the_same_personas_from_every_format(tmp_path):
    rows = [GOOD | {"priority": 3}, {"id": "bo", "description": 'Bo, a baker: "hot, fresh"\nevery day', "priority": 0}]
    jsonl = write(tmp_path / "p.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    csv = write(
        tmp_path / "p.csv", "id,description,priority", "ada,Ada pilots a ferry.,3", 'bo,"Bo, a baker: ""hot, fresh""',
        'every day",0',
    )  # fmt: skip
    expected = [(p.id, p.description, p.priority) for p in read_manifest(jsonl).personas]
    assert expected == [("ada", "Ada pilots a ferry.", 3), ("bo", rows[1]["description"], 0)]
    for url in (csv, str(tmp_path / "p.parquet")):
        assert [(p.id, p.description, p.priority) for p in read_manifest(url).personas] == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"description": "x"}, "id is missing"),
        ({"id": "", "description": "x"}, "id '' is not usable"),
        ({"id": "a" * 129, "description": "x"}, "is not usable"),
        ({"id": "../x", "description": "x"}, "id '../x' is not usable"),
        ({"id": "a/b", "description": "x"}, "id 'a/b' is not usable"),
        ({"id": ".hidden", "description": "x"}, "id '.hidden' is not usable"),
        ({"id": "a\nb", "description": "x"}, "is not usable"),
        ({"id": "a\0b", "description": "x"}, "is not usable"),
        ({"id": "a\n", "description": "x"}, "is not usable"),
        ({"id": 7, "description": "x"}, "id 7 is not usable"),
        ({"id": "a"}, "description is missing"),
        ({"id": "a", "description": "  "}, "must be text"),
        ({"id": "a", "description": 3}, "must be text"),
        ({"id": "a", "description": "x\0"}, "null byte"),
        ({"id": "a", "description": "x", "priority": "high"}, "priority 'high'"),
        ({"id": "a", "description": "x", "metadata": 1}, "metadata 1 must be an object"),
        ('{"id": "a", ', "broken JSON"),
        ('["a"]', "must be an object"),
    ],
)
def test_bad_row_is_one_line_with_file_and_row(tmp_path, row, said):
    url = write(tmp_path / "p.jsonl", GOOD, GOOD | {"id": "b"}, row)
    (line,) = faults(url)
    assert line.startswith(f"{url}:3: ")
    assert said in line
    assert len(line) < 400


def test_all_faults_come_in_one_go_but_at_most_twenty(tmp_path):
    url = write(tmp_path / "p.jsonl", *[{"id": f"x{n}"} for n in range(30)])
    lines = faults(url)
    assert lines[0] == f"{url}:1: description is missing"
    assert len(lines) == 21
    assert lines[-1] == "... and 10 more faults"


def test_repeated_id_names_both_rows(tmp_path):
    url = write(tmp_path / "p.jsonl", GOOD, {"id": "b", "description": "x"}, GOOD)
    assert faults(url) == [f"{url}:3: id 'ada' is already that of row 1"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b"", "holds no persona"),
        ("p.jsonl", b"\n\n", "holds no persona"),
        (
            "p.jsonl",
            b'{"id": "a", "description": "x"}\n{"id": "b", "description": "\xff"}\n',
            ":2: not UTF-8: byte 0xff",
        ),
        ("p.csv", b"id,text\na,b\n", "no column description; found id, text"),
        ("p.csv", b"id,description\na,b,c\n", "more fields than the header"),
        ("p.csv", b'id,description\na,"no end\n', "broken CSV"),
        ("p.csv", b"id,description\n", "holds no persona"),
        ("p.csv", b"id,description\na,x\nb,\xff\n", ":3: not UTF-8: byte 0xff at offset 21"),
        ("p.parquet", b"nonsense", "not a readable Parquet file"),
        ("p.txt", b"x", "unknown kind of manifest '.txt'"),
    ],
)
def test_bad_file_is_one_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    (line,) = faults(str(tmp_path / name))
    assert said in line


def test_faults_of_every_kind_come_in_the_order_of_the_file(tmp_path):
    url = tmp_path / "p.jsonl"
    data = b'{"id": "../x", "description": "x"}\n{"id": "b", "description": "\xe9"}\n{"id"\n{"id": "c"}\n'
    url.write_bytes(data)
    assert [line.removeprefix(f"{url}:")[:20] for line in faults(str(url))] == [
        "1: id '../x' is not usable"[:20], "2: not UTF-8: byte 0xe9"[:20], "3: broken JSON: Expecting"[:20],
        "4: description is missing"[:20],
    ]  # fmt: skip
    assert f"at offset {data.index(0xE9)}" in faults(str(url))[1]


def test_damaged_parquet_is_one_line(tmp_path):
    url = tmp_path / "p.parquet"
    pq.write_table(pa.table({"id": [f"p{n}" for n in range(1000)], "description": ["x"] * 1000}), url)
    damaged = bytearray(url.read_bytes())
    damaged[50:3000] = bytes(2950)
    url.write_bytes(damaged)
    (line,) = faults(str(url))
    assert "not a readable Parquet file" in line
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())
    pq.write_table(pa.table({"id": ["a"], "description": not_utf8}), url)
    (line,) = faults(str(url))
    assert "not UTF-8: byte 0xff" in line


def test_mark_at_the_start_of_a_file_is_no_part_of_it(tmp_path):
    for name, text in (("p.jsonl", json.dumps(GOOD)), ("p.csv", "id,description\r\nada,Ada pilots a ferry.\r\n")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        (persona,) = read_manifest(str(tmp_path / name)).personas
        assert (persona.id, persona.description) == ("ada", GOOD["description"])


def test_directory_is_no_manifest(tmp_path):
    (line,) = faults(str(tmp_path))
    assert "Is a directory" in line


def test_missing_file(tmp_path):
    assert faults(str(tmp_path / "no.jsonl")) == [f"{tmp_path}/no.jsonl: no such manifest"]


def test_huge_description_is_one_short_line(tmp_path):
    url = write(tmp_path / "p.jsonl", {"id": "a", "description": "x" * 50_000_000})
    (line,) = faults(url)
    assert line == f"{url}:1: description has 50,000,000 characters, at most 20,000 are allowed"


def test_unknown_column_warns_once_and_metadata_does_not(tmp_path):
    url = write(tmp_path / "p.jsonl", GOOD | {"mood": 1, "metadata": {"any": 1}}, {**GOOD, "id": "b", "mood": 2})
    (warning,) = read_manifest(url).warnings
    assert warning == f"{url}:1: column 'mood' is not known and ignored; put it under metadata"


def test_ten_thousand_rows_stay_under_300_mb(tmp_path):
    text = "A person who sells fish at the harbour and talks too much. " * 6
    url = write(tmp_path / "p.jsonl", *[{"id": f"p{n}", "description": f"{n} {text}"} for n in range(10_000)])
    code = (
        "import sys; from persona_pruner.manifest import read_manifest; "
        "print(len(read_manifest(sys.argv[1]).personas)); "
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    )
    out = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == 10_000
    assert int(out[1]) < 300 * 1024


def test_manifest_in_object_storage(bucket, tmp_path):
    local = write(tmp_path / "p.jsonl", GOOD)
    bucket.put("p.jsonl", (tmp_path / "p.jsonl").read_bytes())
    assert read_manifest(f"{bucket.url}/p.jsonl").personas == read_manifest(local).personas
    assert faults(f"{bucket.url}/q.jsonl") == [f"{bucket.url}/q.jsonl: no such manifest"]


def opposed(tmp_path, *opposites):
    rows = [{"id": f"p{n}", "description": f"person {n}", "opposite": o} for n, o in enumerate(opposites)]
    return write(tmp_path / "m.jsonl", *rows)


def test_an_opposite_is_another_row_and_counts_for_both(tmp_path):
    one, two, three = read_manifest(opposed(tmp_path, "p1", None, None)).personas
    assert one.opposite == Persona("p1", "person 1")
    assert two.opposite == Persona("p0", "person 0")
    assert three.opposite is None
    check_opposites([one, two], "contrastive_wanda")
    with pytest.raises(ManifestError, match="p2: has no opposite"):
        check_opposites([one, two, three], "contrastive_wanda")


@pytest.mark.parametrize(
    ("opposites", "told"),
    [
        (("p9", None), "m.jsonl:1: opposite 'p9' must be the id of another row"),
        (("p0", None), "m.jsonl:1: opposite 'p0' must be the id of another row"),
        ((7, None), "m.jsonl:1: opposite 7 must be the id of another row"),
        (("p2", "p2", None), "m.jsonl:3: 'p2' is the opposite of 'p0' and 'p1'; name its own"),
    ],
)
def test_an_opposite_that_cannot_be_is_told(tmp_path, opposites, told):
    with pytest.raises(ManifestError, match=told):
        read_manifest(opposed(tmp_path, *opposites))
