import os

import pytest

from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import StorageError
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.local import PART, LocalStorage


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "run", StorageConfig(deadline_seconds=0.01))


def test_a_failed_write_leaves_the_old_object_and_nothing_else(storage):
    storage.put("masks/a", b"old")

    def pieces():
        yield b"ne"
        raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match="masks/a: Input/output error"):
        storage.put_pieces("masks/a", pieces)
    assert storage.get("masks/a") == b"old"
    assert os.listdir(storage.root / "masks") == ["a"]


def test_a_write_that_fails_for_a_moment_is_made_again_from_its_first_piece(tmp_path):
    storage = LocalStorage(tmp_path, StorageConfig(deadline_seconds=20))
    tries = []

    def pieces():
        tries.append(1)
        yield b"whole "
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        yield b"content"

    storage.put_pieces("x", pieces)
    assert storage.get("x") == b"whole content"


def test_the_first_of_two_creators_wins(storage):
    assert storage.put_if_absent("lease/1", b"first")
    assert not storage.put_if_absent("lease/1", b"second")
    assert storage.get("lease/1") == b"first"


def test_ranges_end_where_the_object_does(storage):
    storage.put("x", b"0123456789")
    assert storage.get_range("x", 2, 3) == b"234"
    assert storage.get_range("x", 8, 5) == b"89"
    assert storage.get_range("x", 20, 5) == b""


def test_a_listing_has_the_order_of_its_keys_and_no_unfinished_writes(storage):
    for key in ("b/1", "a/2", "a/10", "ab", "a.b"):
        storage.put(key, b"x")
    (storage.root / "a" / f"{PART}left").write_bytes(b"half")
    assert [item.key for item in storage.list()] == ["a.b", "a/10", "a/2", "ab", "b/1"]
    assert [item.key for item in storage.list("a/")] == ["a/10", "a/2"]
    assert [item.key for item in storage.list("a/1")] == ["a/10"]
    assert list(storage.list("nothing/")) == []


def test_directories_leave_with_their_last_object(storage):
    storage.put("checkpoints/deep/a", b"x")
    storage.put("checkpoints/b", b"x")
    storage.delete("checkpoints/deep/a")
    assert os.listdir(storage.root / "checkpoints") == ["b"]
    storage.delete("checkpoints/b")
    storage.delete("checkpoints/b")
    assert os.listdir(storage.root) == []


def test_what_a_killed_process_left_is_found_by_its_age_and_removed(storage):
    storage.put("a", b"x")
    left = storage.root / f"{PART}left"
    left.write_bytes(b"half")
    os.utime(left, (1000, 1000))
    assert storage.incomplete_writes(before=999) == []
    assert storage.incomplete_writes(before=2000) == [f"{PART}left"]
    assert left.exists()
    storage.incomplete_writes(before=2000, remove=True)
    assert os.listdir(storage.root) == ["a"]


def test_absent_objects_and_keys_that_leave_the_prefix_are_named(storage):
    with pytest.raises(NotFoundError, match=r"run/masks/a: no such object"):
        storage.get("masks/a")
    storage.put("file", b"x")
    with pytest.raises(NotFoundError, match="no such object"):
        storage.get("file/below")
    for key in ("../x", "/etc/passwd", "a//b", ""):
        with pytest.raises(StorageError, match="would leave its prefix"):
            storage.put(key, b"x")


def test_looking_whether_a_place_can_be_written_makes_nothing(storage, tmp_path):
    storage.check_writable()
    assert os.listdir(tmp_path) == []
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="is no directory"):
        storage.check_writable()


def test_links_need_object_storage(storage):
    with pytest.raises(StorageError, match="use an s3:// output"):
        storage.share("a", 60)
