"""The documentation builds without a broken link, and names only commands and options that exist."""

import re
import subprocess
import sys

import pytest
import typer
import yaml
from pages import PAGES, ROOT, blocks_of, commands_of

from persona_pruner.cli import app
from persona_pruner.config.load import check_config


def test_site_builds_with_broken_links_as_errors(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "learning.ratio" in (tmp_path / "site/reference/configuration/index.html").read_text()
    assert "persona-pruner-pull" in (tmp_path / "site/reference/commands/index.html").read_text()


def documented_commands():
    for page in [*PAGES, ROOT / "cluster" / "README.md"]:
        for command, rest in commands_of(page):
            yield pytest.param(command, rest, id=f"{page.name}: {command}{rest.rstrip()[:40]}")


@pytest.mark.parametrize(("command", "rest"), list(documented_commands()))
def test_documented_commands_and_options_exist(command, rest):
    group = typer.main.get_command(app)
    assert command in group.commands
    command = group.commands[command]
    if hasattr(command, "commands"):
        word, _, rest = rest.strip().partition(" ")
        command = command.commands[word]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    own, _, _ = rest.partition(" -- ")  # behind it are the engine's options
    assert set(re.findall(r"(?<!\S)--[a-z-]+", own)) <= known | {"--help"}


def test_configurations_that_the_pages_show_are_valid():
    shown = [block for page in PAGES for block in blocks_of(page) if block.language == "yaml"]
    assert shown
    for block in shown:
        check_config(yaml.safe_load(block.text), str(block))
