"""The application that the commands are registered with, and how they print."""

import json
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    help="One FFN-channel mask per persona on one frozen, shared LLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()


def say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def show(values: dict[str, Any], as_json: bool) -> None:
    """Print one JSON object, or a line for each value."""
    if as_json:
        print(json.dumps(values, indent=1, default=str))
        return
    for name, value in values.items():
        say(f"{name.replace('_', ' ')}: {value}")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"persona-pruner {version('persona-pruner')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One FFN-channel mask per persona on one frozen, shared LLM."""
