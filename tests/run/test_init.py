import json

import pytest
import yaml
from command_line import run
from tiny_models import save_tiny

from persona_pruner.config.load import load_config
from persona_pruner.errors import BackboneError, ConfigError, SourceError
from persona_pruner.manifest import read_manifest
from persona_pruner.run.init import EXAMPLE, copy_example, find_columns, write_config
from persona_pruner.run.preflight import preflight


def questions(file, *columns):
    file.write_text("".join(json.dumps({c: f"{c} {n}" for c in columns} | {"score": n}) + "\n" for n in range(2)))
    return str(file)


@pytest.mark.parametrize(
    ("columns", "found"),
    [(("instruction", "input", "output"), ("instruction", "output", "input")),
     (("id", "question", "response"), ("question", "response", None)),
     (("title",), ("title", None, None))],
)  # fmt: skip
def test_columns_are_found_by_their_usual_names(tmp_path, columns, found):
    one = find_columns(questions(tmp_path / "q.jsonl", *columns))
    assert (one.question, one.answer, one.input) == found
    assert set(one.others) == {*columns, "score"} - set(found)


def test_a_file_without_text_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(SourceError, match="no column holds text; found n"):
        find_columns(str(tmp_path / "q.jsonl"))


def test_the_configuration_is_ready_to_run_and_says_what_it_found(tmp_path):
    model = save_tiny(tmp_path / "my model")
    asked = questions(tmp_path / "q.jsonl", "prompt", "response")
    file = write_config(tmp_path / "run", str(model), [asked])
    config = load_config(file)
    preflight(config)
    assert config.backbone.dtype == "float32"
    assert (config.synthesis.sources[0].question, config.synthesis.sources[0].answer) == ("prompt", "response")
    assert config.synthesis.sources[0].input is None
    text = file.read_text()
    assert "also there: score" in text
    assert text.count("#") > 8
    assert set(yaml.safe_load(text)) == {"backbone", "synthesis", "learning", "gpus", "evaluation"}


def test_files_beside_the_configuration_are_named_from_there(tmp_path):
    save_tiny(tmp_path / "model")
    asked = questions(tmp_path / "q.jsonl", "question")
    tree = yaml.safe_load(write_config(tmp_path, str(tmp_path / "model"), [asked]).read_text())
    assert tree["backbone"]["path"] == "./model"
    assert tree["synthesis"]["sources"][0]["path"] == "./q.jsonl"
    with pytest.raises(ConfigError, match=r"run\.yaml: exists already"):
        write_config(tmp_path, str(tmp_path / "model"), [asked])


def test_a_model_that_cannot_be_used_leaves_no_configuration(tmp_path):
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(BackboneError, match="no chat template"):
        write_config(tmp_path, str(model), [questions(tmp_path / "q.jsonl", "question")])
    assert not (tmp_path / "run.yaml").exists()


def test_the_packaged_example_is_complete_and_never_overwrites(tmp_path):
    written = copy_example(tmp_path / "new")
    assert {file.name for file in written} == {path.name for path in EXAMPLE.iterdir()}
    assert not any(file.is_symlink() for file in (tmp_path / "new").rglob("*"))
    assert len(read_manifest(str(tmp_path / "new" / "personas.jsonl")).personas) == 24
    preflight(load_config(tmp_path / "new" / "run.yaml"))
    before = sorted((tmp_path / "new").rglob("*"))
    with pytest.raises(ConfigError, match="exists already"):
        copy_example(tmp_path / "new")
    assert sorted((tmp_path / "new").rglob("*")) == before


def test_the_command_says_what_to_run_next(tmp_path):
    done = run("init", "new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "persona-pruner run new/personas.jsonl --config new/run.yaml" in done.stdout
    done = run("init", "other", "--backbone", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert "give --backbone and --questions" in done.stderr
