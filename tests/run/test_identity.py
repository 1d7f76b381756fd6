import dataclasses
import gzip
import json
import shutil

import pytest
from tiny_models import save_tiny, tiny_config

from persona_pruner.config.load import check_config
from persona_pruner.errors import ConfigError
from persona_pruner.manifest import Persona
from persona_pruner.run.identity import check_run, identify
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

PEOPLE = tuple(Persona(f"p{n}", f"person {n}") for n in range(4))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "out")


@pytest.fixture
def files(tmp_path):
    """Everything that a configuration can name by a path."""
    here = tmp_path / "files"
    (here / "more").mkdir(parents=True)
    (here / "questions").mkdir()
    (here / "pool.jsonl").write_text('{"instruction": "Why?", "output": "So."}\n')
    (here / "more" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"instruction": "Who?", "output": "I."}\n', mtime=0))
    (here / "people.jsonl").write_text('{"id": "r0", "description": "one"}\n{"id": "r1", "description": "two"}\n')
    (here / "questions" / "p0.json").write_text('["What?"]')
    return here


def config(backbone, files):
    return check_config(
        {
            "backbone": {"path": str(backbone)},
            "synthesis": {
                "sources": [{"path": str(files / "pool.jsonl")}, {"path": str(files / "more")}],
                "references": {"path": str(files / "people.jsonl")},
            },
            "evaluation": {"questions": str(files / "questions")},
        }
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("pool.jsonl", b'{"instruction": "Why not?", "output": "So."}\n'),
        ("more/a.jsonl.gz", gzip.compress(b'{"instruction": "Who?", "output": "You."}\n', mtime=0)),
        ("more/b.jsonl.gz", gzip.compress(b'{"instruction": "Who?", "output": "You."}\n', mtime=0)),
        ("people.jsonl", b'{"id": "r0", "description": "one"}\n{"id": "r1", "description": "three"}\n'),
        ("questions/p0.json", b'["What?", "When?"]'),
        ("questions/p1.txt", b"What?\n"),
    ],
)
def test_changed_content_is_another_run_and_its_setting_is_named(backbone, storage, files, file, content):
    before = identify(config(backbone, files), PEOPLE, storage)
    storage.put(keys.RUN, json.dumps(before.document()).encode())
    (files / file).write_bytes(content)
    after = identify(config(backbone, files), PEOPLE, storage)
    assert after.run_id != before.run_id
    with pytest.raises(ConfigError, match=r"the content of (synthesis|evaluation)\.\w+.* has sha256 \w+ there and"):
        check_run(storage, after)


def test_moving_the_files_and_the_backbone_is_the_same_run(backbone, storage, files, tmp_path):
    before = identify(config(backbone, files), PEOPLE, storage)
    moved = shutil.copytree(files, tmp_path / "elsewhere")
    shutil.copytree(backbone, tmp_path / "model")
    assert identify(config(tmp_path / "model", moved), PEOPLE, storage).run_id == before.run_id


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), ("chat_template.jinja", "assistant", "bot")],
)
def test_what_the_backbone_reads_is_part_of_the_run(backbone, storage, tmp_path, file, old, new):
    before = identify(tiny_config(backbone), PEOPLE, storage)
    copy = shutil.copytree(backbone, tmp_path / "tiny")
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    assert identify(tiny_config(copy), PEOPLE, storage).run_id != before.run_id


def test_a_newer_library_that_saved_the_model_is_not(backbone, storage, tmp_path):
    copy = shutil.copytree(backbone, tmp_path / "tiny")
    values = json.loads((copy / "config.json").read_text()) | {"transformers_version": "99"}
    (copy / "config.json").write_text(json.dumps(values))
    assert (
        identify(tiny_config(copy), PEOPLE, storage).run_id == identify(tiny_config(backbone), PEOPLE, storage).run_id
    )


def test_references_from_the_manifest_stay_when_it_grows(backbone, storage):
    first = identify(tiny_config(backbone), PEOPLE[:2], storage)
    assert identify(tiny_config(backbone), PEOPLE, storage).run_id != first.run_id
    storage.put(keys.RUN, json.dumps(first.document()).encode())
    grown = identify(tiny_config(backbone), PEOPLE, storage)
    check_run(storage, grown)
    assert {p.id for p in grown.references} == {"p0", "p1"}


def test_other_settings_on_one_output_are_named_with_both_values(backbone, storage):
    identity = identify(tiny_config(backbone), PEOPLE, storage)
    storage.put(keys.RUN, json.dumps(identity.document()).encode())
    check_run(storage, identity)
    with pytest.raises(ConfigError, match=r"learning\.ratio is 0\.5 there and 0\.25 here"):
        check_run(storage, identify(tiny_config(backbone, ratio=0.25), PEOPLE, storage))
    with pytest.raises(ConfigError, match="the backbone is tiny"):
        check_run(storage, dataclasses.replace(identity, fingerprint="0" * 64))
    storage.put(keys.RUN, json.dumps({"format": 1, "run_id": "x", "settings": {}}).encode())
    with pytest.raises(ConfigError, match=r"run\.json has format 1"):
        check_run(storage, identity)


def test_a_missing_source_or_directory_of_questions_is_told(backbone, storage, files):
    shutil.rmtree(files / "questions")
    with pytest.raises(ConfigError, match=r"evaluation\.questions = .*there are no files"):
        identify(config(backbone, files), PEOPLE, storage)
