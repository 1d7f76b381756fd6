from command_line import run


def test_pull_must_say_which(tmp_path):
    done = run("pull", tmp_path, "--to", tmp_path / "to")
    assert done.returncode == 2
    assert "--all" in done.stderr


def test_pull_from_where_no_mask_is_makes_nothing(tmp_path):
    done = run("pull", tmp_path / "typo", "--all", "--to", tmp_path / "to")
    assert done.returncode == 2
    assert f"{tmp_path}/typo: holds no mask" in done.stderr
    assert list(tmp_path.iterdir()) == []
