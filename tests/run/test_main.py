import pytest

from persona_pruner.errors import ClusterError, ConfigError
from persona_pruner.run.main import Command, exit_status, run


def test_a_users_fault_is_its_line_and_its_status(capsys):
    def body():
        raise ClusterError("no shard group comes up")

    assert exit_status(body) == 5
    assert capsys.readouterr().err == "no shard group comes up\n"
    assert exit_status(lambda: 75) == 75


def test_bad_arguments_are_told_before_anything_is_loaded(tmp_path):
    command = Command(manifest="m.jsonl", config=str(tmp_path / "no.yaml"), output="out", part="11/10")
    with pytest.raises(ConfigError, match="--part 11/10"):
        run(command)
    with pytest.raises(ConfigError, match="no such configuration file"):
        run(Command(manifest="m.jsonl", config=str(tmp_path / "no.yaml"), output="out"))
