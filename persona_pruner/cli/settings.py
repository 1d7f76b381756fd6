"""The command that explains the run configuration."""

import json
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel

from persona_pruner.cli.app import app, console
from persona_pruner.cli.options import JsonOption
from persona_pruner.errors import ConfigError


@app.command()
def config(
    key: Annotated[list[str] | None, typer.Argument(help="Only these settings or sections, e.g. learning.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain every setting of a run configuration, or those below KEY, with its default."""
    if as_json and not key:
        from persona_pruner.config.schema import RunConfig

        print(json.dumps(RunConfig.model_json_schema(), indent=1))
        return
    settings = list(all_settings())
    for prefix in key or ():
        if not any(_is_below(name, prefix) for name, _, _ in settings):
            raise ConfigError(f"{prefix}: no such setting; `persona-pruner config` lists all")
    shown = [row for row in settings if not key or any(_is_below(row[0], prefix) for prefix in key)]
    if as_json:
        print(json.dumps({name: {"default": default, "help": text} for name, default, text in shown}, indent=1))
        return
    width = min(console.width, 100)
    for name, default, text in shown:
        print(f"{name}: {default}" if default else f"{name} (required)")
        print(textwrap.fill(" ".join(text.split()), width, initial_indent="    ", subsequent_indent="    "))


def all_settings() -> Iterator[tuple[str, str, str]]:
    """(dotted name, default as JSON or "" where required, help) of every setting; lists of sections are `name[].`."""
    from persona_pruner.config.schema import RunConfig

    yield from _settings(RunConfig)


def _is_below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith((f"{prefix}.", f"{prefix}[]."))


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        default: Any = field.default
        if isinstance(default, BaseModel):
            yield from _settings(type(default), f"{prefix}{name}.")
            continue
        yield prefix + name, "" if field.is_required() else json.dumps(default, default=str), field.description or ""
        for inner in get_args(field.annotation):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _settings(inner, f"{prefix}{name}[].")
