import json

import pytest
from mask_examples import mask

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
from persona_pruner.errors import StorageError, UserError
from persona_pruner.evaluation.report.push import PUSHED, PushRequest, push
from persona_pruner.masks.catalog import update_catalog
from persona_pruner.masks.store import MaskStore
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


@pytest.fixture
def output(tmp_path):
    storage = open_storage(tmp_path / "out")
    for seed, persona_id in enumerate(("ada", "bo")):
        storage.put(keys.mask(persona_id), mask(persona_id, seed=seed).to_bytes())
    update_catalog(storage)
    storage.put(keys.RUN, json.dumps({"run_id": "r", "backbone": {"name": "tiny"}}).encode())
    storage.put(keys.checkpoint("ada"), b"of the training")
    return tmp_path / "out"


def pushed(output, to, **options):
    return push(PushRequest(output=str(output), to=str(to), **options))


def test_what_is_pushed_can_be_used_and_nothing_else_goes_along(output, tmp_path):
    made = pushed(output, tmp_path / "there")
    assert MaskStore(tmp_path / "there").verify() == 2
    (catalog,) = (path for path in made.moved if path.startswith(keys.CATALOG))
    assert sorted(made.moved) == sorted(
        [keys.mask("ada"), keys.mask("bo"), catalog, keys.RUN, keys.REPORT, "README.md"]
    )
    assert f'MaskStore("{tmp_path / "there"}")' in (tmp_path / "there/README.md").read_text()
    assert "2 masks compared" in (tmp_path / "there/report.html").read_text()
    files = {path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*.*")}
    assert files == {*made.moved, PUSHED}


@pytest.fixture
def with_report(output):
    (output / "report.html").write_text("my report")
    return output


def test_a_second_push_moves_what_has_changed_and_removes_the_catalog_that_it_replaces(with_report, tmp_path):
    first = pushed(with_report, tmp_path / "there")
    again = pushed(with_report, tmp_path / "there")
    assert (again.moved, again.unchanged) == ([], len(first.moved))
    storage = open_storage(with_report)
    storage.put(keys.mask("cy"), mask("cy", seed=5).to_bytes())
    (old,) = (item.key for item in storage.list(keys.CATALOG))
    update_catalog(storage, fresh=True)
    third = pushed(with_report, tmp_path / "there")
    assert keys.mask("cy") in third.moved
    assert keys.mask("ada") not in third.moved
    assert third.removed == [old]
    assert len(list((tmp_path / "there/catalog").iterdir())) == 1
    assert MaskStore(tmp_path / "there").ids() == ["ada", "bo", "cy"]


def test_a_bucket_of_a_real_server_takes_it_and_a_second_push_moves_what_has_changed(with_report, bucket):
    first = pushed(with_report, bucket.url)
    assert MaskStore(bucket.url).verify() == 2
    assert bucket.get(keys.REPORT) == b"my report"
    again = pushed(with_report, bucket.url)
    assert (again.moved, again.unchanged) == ([], len(first.moved))
    (with_report / "report.html").write_text("another report")
    assert pushed(with_report, bucket.url).moved == [keys.REPORT]
    bucket.put("README.md", b"mended there")
    (with_report / "README.md").write_text("mended here")
    with pytest.raises(UserError, match=r"README\.md would be overwritten"):
        pushed(with_report, bucket.url)
    assert bucket.get("README.md") == b"mended there"


def test_what_others_have_written_there_is_not_overwritten(with_report, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "README.md").write_text("of somebody else")
    (there / "notes.txt").write_text("too")
    with pytest.raises(UserError, match=r"README\.md would be overwritten.*nothing was pushed.*--overwrite"):
        pushed(with_report, there)
    assert sorted(path.name for path in there.iterdir()) == ["README.md", "notes.txt"]
    pushed(with_report, there, overwrite=True)
    assert "Persona masks" in (there / "README.md").read_text()
    assert (there / "notes.txt").read_text() == "too"
    # Changed there after our push, and in the output too.
    (there / "README.md").write_text("mended there")
    (with_report / "README.md").write_text("mended here")
    with pytest.raises(UserError, match=r"README\.md would be overwritten"):
        pushed(with_report, there)
    assert (there / "README.md").read_text() == "mended there"


def test_a_card_and_a_report_of_the_output_are_pushed_as_they_are(with_report, tmp_path):
    (with_report / "README.md").write_text("my own card")
    pushed(with_report, tmp_path / "there")
    assert (tmp_path / "there/README.md").read_text() == "my own card"
    assert (tmp_path / "there/report.html").read_text() == "my report"


def test_a_mask_that_does_not_verify_ends_the_push_before_anything_is_moved(output, tmp_path):
    (output / keys.mask("bo")).write_bytes(b"broken")
    with pytest.raises(UserError, match="bo"):
        pushed(output, tmp_path / "there")
    assert not list((tmp_path / "there").rglob("*.*"))


def test_what_cannot_be_meant_is_told(output, tmp_path):
    with pytest.raises(UserError, match="is the output itself"):
        pushed(output, output)
    with pytest.raises(UserError, match="--backbone PATH"):
        pushed(output, tmp_path / "there", checkpoints=("ada",))
    with pytest.raises(StorageError, match="no mask of persona 'nobody'"):
        pushed(output, tmp_path / "there", checkpoints=("nobody",), backbone="x")


def test_checkpoints_lie_beside_the_masks(tmp_path):
    from evaluated_run import make_run
    from transformers import AutoModelForCausalLM

    make_run(tmp_path)
    pushed(tmp_path / "out", tmp_path / "there", checkpoints=("ann",), backbone=str(tmp_path / "tiny"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "there/exported/ann")
    assert model.config.intermediate_size == 40
    assert "exported/ann" in (tmp_path / "there/README.md").read_text()
    assert len(MaskStore(tmp_path / "there").ids()) == 3
