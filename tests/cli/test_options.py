import runpy

import pytest
import typer
from command_line import ROOT

from persona_pruner.cli import app


def parameters(command):
    """What a user sees of a command's parameters, by name."""
    return {
        one.name: (one.opts, getattr(one, "help", None), one.required, one.default)
        for one in command.params
        if not one.name.endswith("completion")
    }


@pytest.mark.parametrize(
    ("job", "function", "command"),
    [
        ("prune_personas", "prune", "run"),
        ("synthesize", "synthesize", "run"),
        ("train_masks", "train", "run"),
        ("evaluate_masks", "evaluate", "evaluate"),
    ],
)
def test_a_job_takes_what_its_command_takes(job, function, command):
    entry = typer.Typer()
    entry.command()(runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))[function])
    taken = parameters(typer.main.get_command(app).commands[command])
    taken.pop("as_json", None)
    assert parameters(typer.main.get_command(entry)) == taken
