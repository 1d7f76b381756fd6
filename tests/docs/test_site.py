"""The documentation builds without a broken link, and names only commands and options that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from persona_pruner.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_site_builds_with_broken_links_as_errors(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "learning.ratio" in (tmp_path / "site/reference/configuration/index.html").read_text()
    assert "persona-pruner-pull" in (tmp_path / "site/reference/commands/index.html").read_text()


def documented_commands():
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(r"(?:^|\s|/)persona-pruner ([a-z]+)([^#|]*)", line):
                    yield pytest.param(match[1], match[2], id=f"{page.name}: {match[1]}{match[2].rstrip()[:40]}")


@pytest.mark.parametrize(("command", "rest"), list(documented_commands()))
def test_documented_commands_and_options_exist(command, rest):
    group = typer.main.get_command(app)
    assert command in group.commands
    command = group.commands[command]
    if hasattr(command, "commands"):
        word, _, rest = rest.strip().partition(" ")
        command = command.commands[word]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known | {"--help"}
