"""The same behaviour on a local directory and on two S3 servers."""

import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from s3_server import new_bucket

from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import StorageError
from persona_pruner.manifest import ID
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, check_key
from persona_pruner.storage.local import LocalStorage
from persona_pruner.storage.open import local_copy, open_storage, read_url
from persona_pruner.storage.s3 import S3Storage

FAST = StorageConfig(deadline_seconds=3.0)


@pytest.fixture(params=["local", "real_s3", pytest.param("ceph_s3", marks=pytest.mark.cluster)])
def storage(request, tmp_path, monkeypatch):
    if request.param == "local":
        return open_storage(tmp_path / "out", FAST)
    server = request.getfixturevalue(request.param)
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    return open_storage(f"s3://{new_bucket(server)}/run", FAST)


def test_put_get_list_delete(storage):
    storage.check_writable()
    assert list(storage.list()) == []
    storage.put("a/b.txt", b"one")
    storage.put("a/b.txt", b"three")
    storage.put("a/c.txt", b"")
    storage.put("b.txt", b"x")
    assert storage.get("a/b.txt") == b"three"
    assert storage.get_range("a/b.txt", 1, 3) == b"hre"
    assert storage.exists("a/c.txt")
    assert not storage.exists("a")
    assert [(item.key, item.size) for item in storage.list("a/")] == [("a/b.txt", 5), ("a/c.txt", 0)]
    assert [item.key for item in storage.list()] == ["a/b.txt", "a/c.txt", "b.txt"]
    storage.delete("a/b.txt")
    storage.delete("a/b.txt")
    with pytest.raises(NotFoundError, match="no such object"):
        storage.get("a/b.txt")


def test_create_if_absent_has_one_winner(storage):
    barrier = threading.Barrier(8)

    def write(number):
        barrier.wait()
        return storage.put_if_absent("lease", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert sum(won) == 1
    assert storage.get("lease") == f"writer {won.index(True)}".encode()


def test_create_if_absent_again_with_own_bytes_is_ours(storage):
    """A client whose answer was lost meets its own object on the next try."""
    if isinstance(storage, LocalStorage):
        pytest.skip("a local link never loses its answer")
    assert storage.put_if_absent("mask", b"same")
    assert storage.put_if_absent("mask", b"same")
    assert not storage.put_if_absent("mask", b"other")


def test_many_objects_come_in_pages(storage):
    if isinstance(storage, LocalStorage):
        pytest.skip("directories have no pages")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: storage.put(f"many/{n:05d}", b"x"), range(1100)))
    assert [item.key for item in storage.list("many/")] == [f"many/{n:05d}" for n in range(1100)]


def test_patterns_find_what_a_listing_holds_and_nothing_beside(storage):
    for key in ("ab/x/mask", "ab/y.z/mask", "ab/mask", "old/mask", "old/mask2", "stray", "ab/x/deep/mask"):
        storage.put(f"m/{key}", key.encode())
    listed = {item.key: item for item in storage.list()}

    def matching(*patterns):
        items = list(storage.match(*patterns))
        assert all(item == listed[item.key] for item in items)
        return sorted(item.key for item in items)

    assert matching("m/*/*/mask") == ["m/ab/x/mask", "m/ab/y.z/mask"]
    assert matching("m/*/*/mask", "m/*/mask") == ["m/ab/mask", "m/ab/x/mask", "m/ab/y.z/mask", "m/old/mask"]
    assert matching("nothing/*/mask") == []


def test_travels_to_another_process(storage):
    storage.put("key", b"value")
    assert pickle.loads(pickle.dumps(storage)).get("key") == b"value"


def test_url_and_copy_of_a_prefix(storage, tmp_path, monkeypatch):
    monkeypatch.setattr("persona_pruner.storage.open.PIECE_BYTES", 4)
    storage.put("model/config.json", b"{}")
    storage.put("model/sub/weights", b"in pieces")
    assert read_url(f"{storage.url}/model/config.json") == b"{}"
    copy = local_copy(f"{storage.url}/model", tmp_path / "cache")
    assert (copy / "config.json").read_bytes() == b"{}"
    assert (copy / "sub" / "weights").read_bytes() == b"in pieces"


def test_wrong_bytes_of_the_right_length_are_refused(storage):
    if isinstance(storage, LocalStorage):
        pytest.skip("the file system is trusted; masks carry a checksum of their own")
    storage.put("object", b"right")
    head = storage.client.head_object(Bucket=storage.bucket, Key="run/object")
    storage.client.put_object(Bucket=storage.bucket, Key="run/object", Body=b"wrong", Metadata=head["Metadata"])
    with pytest.raises(StorageError, match="does not match the sha256"):
        storage.get("object")


@given(st.text(max_size=40))
@example("a.json")
@example("a.safetensors")
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_id_escapes_its_prefix(tmp_path, text):
    """Whatever passes as an id stays below masks/; whatever else is refused as a key or is no id."""
    local, remote = LocalStorage(tmp_path, FAST), S3Storage("bucket", "run", FAST)
    if ID.fullmatch(text):
        for key in (keys.mask(text), keys.error(text), keys.checkpoint(text), keys.persona_data(text)):
            check_key(key)
            assert local._path(key).resolve().is_relative_to(tmp_path.resolve())
            assert remote._name(key).startswith("run/")
            assert ".." not in remote._name(key).split("/")
            assert keys.persona_of_mask(keys.mask(text)) == text
            assert keys.persona_of_mask(keys.mask_of_format_1(text)) == text
            assert keys.persona_of(keys.error(text), keys.ERRORS) == text
            assert keys.persona_of(keys.checkpoint(text), keys.CHECKPOINTS) == text
    else:
        for part in text.split("/"):
            if part in ("", ".", ".."):
                with pytest.raises(StorageError):
                    local._path(f"masks/{text}")
                with pytest.raises(StorageError):
                    remote._name(f"masks/{text}")


def test_unwritable_places_are_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is no directory"):
        open_storage(tmp_path / "file" / "out").check_writable()
    with pytest.raises(StorageError, match="unknown kind of storage"):
        open_storage("ftp://host/x")
    with pytest.raises(StorageError, match="no bucket"):
        open_storage("s3:///x")


def test_reading_parquet_leaves_no_thread_behind_that_could_abort_the_process_at_its_end():
    script = """if True:
        import io, os
        import pyarrow as pa, pyarrow.parquet as pq
        from persona_pruner.storage.open import read_parquet
        stream = io.BytesIO()
        pq.write_table(pa.table({"id": range(100_000), "description": ["x"] * 100_000}), stream)
        threads = lambda: len(os.listdir("/proc/self/task"))
        before = threads()
        assert read_parquet(stream.getvalue()).num_rows == 100_000
        assert read_parquet(stream.getvalue(), ["id", "absent"]).column_names == ["id"]
        assert threads() == before, (before, threads())
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
