"""What is shipped; submissions to a real cluster are in tests/cluster/test_submit.py."""

import pytest

from persona_pruner.config.load import load_config
from persona_pruner.errors import ConfigError
from persona_pruner.run.submit import Submission, files_of, stage, submit_run


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "in" / "model").mkdir(parents=True)
    (tmp_path / "in" / "model" / "config.json").write_text("{}")
    for name in ("people.jsonl", "questions.jsonl"):
        (tmp_path / "in" / name).write_text("{}\n")
    (tmp_path / "in" / "run.yaml").write_text(
        "backbone: {path: ./model}\nsynthesis: {sources: [{path: ./questions.jsonl}, {path: s3://bucket/more.jsonl}]}\n"
    )
    (tmp_path / "checkpoints.bin").write_text("not for the cluster")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submission(**values):
    return Submission(
        manifest="in/people.jsonl", config="in/run.yaml", output="s3://bucket/run", address="http://x", **values
    )


def test_only_what_the_job_reads_is_shipped_under_its_own_names(project, tmp_path_factory):
    to = tmp_path_factory.mktemp("shipped")
    stage(files_of(submission(), load_config("in/run.yaml")), to)
    shipped = sorted(str(path.relative_to(to)) for path in to.rglob("*") if path.is_file())
    assert shipped == ["in/model/config.json", "in/people.jsonl", "in/questions.jsonl", "in/run.yaml"]


def test_absolute_paths_are_those_of_the_cluster(project):
    config = load_config("in/run.yaml", ["backbone.path=/mnt/models/llama"])
    assert "/mnt/models/llama" not in map(str, files_of(submission(), config))


def test_the_command_is_that_of_a_run_with_its_options():
    words = submission(options=["--limit", "3", "--part", "1/2"]).command
    assert words[:5] == ["python", "-m", "persona_pruner", "run", "in/people.jsonl"]
    assert words[-4:] == ["--limit", "3", "--part", "1/2"]


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(ConfigError, match="--env NOT_SET_HERE"):
        submit_run(submission(env=["NOT_SET_HERE"]), None, False, print_json=False)
