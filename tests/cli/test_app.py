import os
import subprocess
import sys

from command_line import ROOT, run


def test_version_and_module_form_agree():
    version = run("--version").stdout
    assert version.startswith("persona-pruner ")
    module = subprocess.run(
        [sys.executable, "-m", "persona_pruner", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert module.stdout == version


def test_a_shell_completes_commands():
    asked = {"_PERSONA_PRUNER_COMPLETE": "complete_bash", "COMP_WORDS": "persona-pruner val", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "persona_pruner"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | asked)
    assert done.stdout.split() == ["validate"]


def test_the_help_begins_with_what_somebody_new_needs():
    shown = run("--help").stdout
    places = [shown.index(f" {command} ") for command in ("init", "run", "list", "pull", "serve", "config")]
    assert places == sorted(places)
