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


def test_completion_can_be_shown():
    assert "_PERSONA_PRUNER_COMPLETE" in run("--show-completion", "bash").stdout
