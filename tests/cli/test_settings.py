import json

from command_line import run


def test_config_lists_every_setting_with_its_default():
    out = json.loads(run("config", "--json").stdout)
    assert out["$defs"]["LearningConfig"]["properties"]["steps"]["description"] == "Step budget of one persona."


def test_config_of_some_keys_reaches_into_lists():
    out = run("config", "synthesis.sources", "learning.ratio").stdout
    assert "synthesis.sources[].question" in out
    assert "learning.ratio" in out
    assert "learning.steps" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_config_of_an_unknown_key_is_a_fault():
    done = run("config", "learning.nix", "--json")
    assert done.returncode == 2
    assert json.loads(done.stderr)["exit_status"] == 2
