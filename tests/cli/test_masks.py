from command_line import run


def test_pull_must_say_which(tmp_path):
    done = run("pull", tmp_path, "--to", tmp_path / "to")
    assert done.returncode == 2
    assert "--all" in done.stderr
