import json

from typer.testing import CliRunner

from persona_pruner.cli import app
from persona_pruner.errors import ConfigError, StorageError


def doctor(*words):
    return CliRunner().invoke(app, ["doctor", *map(str, words)])


def test_a_red_finding_has_its_remedy_and_decides_the_exit_status(tmp_path):
    (tmp_path / "file").write_text("")
    done = doctor("--output", tmp_path / "file" / "run")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    red = next(number for number, line in enumerate(lines) if line.startswith("RED output: "))
    assert "is no directory" in lines[red]
    assert lines[red + 1].startswith("    do: ")
    assert "things to mend" in lines[-1]


def test_json_has_the_same_findings_and_status(tmp_path):
    (tmp_path / "file").write_text("")
    done = doctor("--output", tmp_path / "file" / "run", "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["ok"]) == (1, False)
    assert {finding["name"] for finding in found["findings"] if finding["ok"] is False} >= {"output"}


def test_a_wrong_configuration_is_told_before_anything_is_looked_at(tmp_path):
    done = doctor("--config", tmp_path / "absent.yaml")
    assert isinstance(done.exception, ConfigError)
    assert "no such configuration file" in str(done.exception)
    assert done.stdout == ""


def test_an_http_address_is_a_job_server_and_the_doctor_runs_there(monkeypatch):
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    done = doctor("--address", "http://127.0.0.1:9", "--env", "NOT_SET_ANYWHERE")
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception) == "--env NOT_SET_ANYWHERE: is not set in this environment"
    done = doctor("--address", "http://127.0.0.1:9")
    assert isinstance(done.exception, StorageError)
    assert "http://127.0.0.1:9: no Ray job server answers" in str(done.exception)
