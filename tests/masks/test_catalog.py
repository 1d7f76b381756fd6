from collections import Counter

import pyarrow.parquet as pq
import pytest
from mask_examples import mask

from persona_pruner.errors import MaskError
from persona_pruner.masks import catalog
from persona_pruner.masks.catalog import build_catalog, update_catalog
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


class Counted:
    """A storage that counts what is asked of it by kind of key."""

    def __init__(self, storage):
        self.storage, self.url, self.calls = storage, storage.url, Counter()

    def __getattr__(self, name):
        call = getattr(self.storage, name)

        def counted(key="", *arguments):
            self.calls[name, key.partition("/")[0]] += 1
            return call(key, *arguments)

        return counted


def fill(storage, names):
    for number, name in enumerate(names):
        storage.put(keys.mask(name), mask(name, seed=number).to_bytes())


@pytest.fixture
def output(tmp_path):
    storage = open_storage(tmp_path / "out")
    fill(storage, ["ada", "bo", "cy"])
    return storage


def stored(storage):
    return pq.read_table(storage.root / keys.CATALOG).to_pylist()


def parts(storage):
    return {item.key for item in storage.list(keys.CATALOG)}


def test_catalog_is_an_index_that_can_be_made_again(output):
    assert update_catalog(output) == 3
    rows = stored(output)
    assert sorted(row["persona_id"] for row in rows) == ["ada", "bo", "cy"]
    assert {row["kept"] for row in rows} == {120}
    assert {row["keep"] for row in rows} == {mask(n, seed=i).packed() for i, n in enumerate(["ada", "bo", "cy"])}
    output.delete(keys.mask("bo"))
    assert build_catalog(output)["persona_id"].to_pylist() == ["ada", "cy"]
    for key in parts(output):
        output.put(key, b"broken")
    assert build_catalog(output)["persona_id"].to_pylist() == ["ada", "cy"]
    assert update_catalog(output, fresh=True) == 2
    assert len(stored(output)) == 2


def test_a_second_update_reads_only_what_is_new(output):
    fill(output, [f"p{n}" for n in range(30)])
    update_catalog(output)
    before = parts(output)
    counted = Counted(output)
    assert update_catalog(counted) == 33
    assert counted.calls["get", "masks"] == 0
    assert counted.calls["put", "catalog"] == 0
    output.put(keys.mask("new"), mask("new").to_bytes())
    output.put(keys.mask("bo"), mask("bo", scores=True).to_bytes())
    counted = Counted(output)
    assert build_catalog(counted).num_rows == 34
    assert counted.calls["get", "masks"] == 2
    counted = Counted(output)
    assert update_catalog(counted) == 34
    assert counted.calls["get", "masks"] == 2
    assert counted.calls["put", "catalog"] == 1
    assert len(stored(output)) == 34
    assert Counted(output).calls["get", "masks"] == 0
    assert not parts(output) & before, "its part held a row that is out of date"


def test_new_masks_leave_full_parts_alone(output, monkeypatch):
    monkeypatch.setattr(catalog, "PART_ROWS", 10)
    fill(output, [f"p{n}" for n in range(47)])
    update_catalog(output)
    before = parts(output)
    assert len(before) == 5
    for number in range(30):
        output.put(keys.mask(f"late{number}"), mask(f"late{number}").to_bytes())
        counted = Counted(output)
        assert update_catalog(counted) == 51 + number
        assert counted.calls["get", "masks"] == 1
        assert counted.calls["put", "catalog"] <= 2
        assert len(parts(output)) <= 5 + 8 + 3
    assert before <= parts(output)
    assert sorted(row["persona_id"] for row in stored(output)) == build_catalog(output)["persona_id"].to_pylist()


def test_two_updates_at_once_leave_no_row_twice_after_the_next(output):
    update_catalog(output)
    (part,) = parts(output)
    twice = pq.read_table(output.root / part).to_pylist()
    catalog._write_part(output, twice[:2])
    assert len(stored(output)) == 5
    assert build_catalog(output).num_rows == 3
    update_catalog(output)
    assert sorted(row["persona_id"] for row in stored(output)) == ["ada", "bo", "cy"]


class Raced(Counted):
    """A storage where another job updates the catalog right before the first object is deleted."""

    raced = False

    def delete(self, key):
        if not self.raced:
            self.raced = True
            update_catalog(self.storage)
        self.storage.delete(key)


def test_two_updates_that_delete_at_once_leave_every_row(tmp_path):
    storage = open_storage(tmp_path / "out")
    for number in range(catalog.SMALL_PARTS):
        fill(storage, [f"p{number}"])
        update_catalog(storage)
    assert len(parts(storage)) == catalog.SMALL_PARTS
    fill(storage, ["last"])
    assert update_catalog(Raced(storage)) == catalog.SMALL_PARTS + 1
    expected = build_catalog(storage)["persona_id"].to_pylist()
    assert sorted(row["persona_id"] for row in stored(storage)) == sorted(expected)


def test_a_mask_that_does_not_verify_is_named_or_left_out(output):
    output.put(keys.mask("bo"), output.get(keys.mask("ada")))
    for call in (build_catalog, update_catalog):
        with pytest.raises(MaskError, match=r"masks/\w\w/bo/mask\.safetensors: is the mask of persona 'ada'"):
            call(output)
    faults = []
    assert build_catalog(output, faults=faults)["persona_id"].to_pylist() == ["ada", "cy"]
    assert len(faults) == 1


def test_a_catalog_of_format_1_gives_way(output):
    output.put(keys.CATALOG_OF_FORMAT_1, b"old")
    update_catalog(output)
    assert not output.exists(keys.CATALOG_OF_FORMAT_1)


def test_only_the_columns_that_are_wanted_are_fetched_of_a_large_part(tmp_path, monkeypatch):
    output = open_storage(tmp_path / "out")
    for number in range(40):
        made = mask(f"p{number}", layers=28, channels=8192, kept=4096, seed=number)
        output.put(keys.mask(f"p{number}"), made.to_bytes())
    update_catalog(output)
    read = 0

    def get_range(key, start, length):
        nonlocal read
        read += length
        return original(key, start, length)

    original = output.get_range
    monkeypatch.setattr(output, "get_range", get_range)
    monkeypatch.setattr(output, "get", None)
    assert build_catalog(output, columns=("run_id",))["run_id"].to_pylist() == ["r"] * 40
    (item,) = output.list(keys.CATALOG)
    assert item.size > 10 * read


def test_catalog_opens_in_datasets_pandas_and_duckdb(output, tmp_path):
    import duckdb
    import pandas
    from datasets import Dataset

    update_catalog(output)
    output.put(keys.mask("dee"), mask("dee").to_bytes())
    update_catalog(output)
    directory = output.root / keys.CATALOG
    files = [str(file) for file in sorted(directory.glob("*.parquet"))]
    assert len(files) == 2
    names = {"ada", "bo", "cy", "dee"}
    assert set(Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))["persona_id"][:]) == names
    assert set(pandas.read_parquet(directory).persona_id) == names
    found = duckdb.sql(f"select persona_id from '{directory}/*.parquet' where ratio = 0.6").fetchall()
    assert {name for (name,) in found} == names


def test_catalog_in_object_storage_opens_as_documented(bucket):
    import datasets
    import duckdb
    import pandas

    fill(bucket, ["ada", "bo", "cy"])
    update_catalog(bucket)
    url = f"{bucket.url}/{keys.CATALOG}"
    catalog = pq.read_table(url)
    found = duckdb.sql("select count(*), min(persona_id) from catalog where ratio = 0.6 and seed > 0").fetchall()
    assert found == [(2, "bo")]
    assert datasets.Dataset(catalog).filter(lambda row: row["seed"] == 2)["persona_id"][:] == ["cy"]
    assert sorted(pandas.read_parquet(url).persona_id) == ["ada", "bo", "cy"]
