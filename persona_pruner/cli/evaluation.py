"""Commands about what masks are worth: evaluate, benchmark, report, gate."""

import json
from typing import Annotated

import typer
from rich.table import Column, Table

from persona_pruner.cli.app import app, console, say
from persona_pruner.cli.options import (
    ConfigOption,
    JsonOption,
    OutputArgument,
    PersonaOption,
    SampleOption,
    SetOption,
)
from persona_pruner.errors import EXIT_PERSONAS_FAILED


@app.command()
def evaluate(
    output: OutputArgument,
    config: ConfigOption,
    set_: SetOption = [],  # noqa: B006
    persona: PersonaOption = [],  # noqa: B006
    sample: SampleOption = None,
) -> None:
    """Ask personas held-out questions unpruned, under their own mask, one mask for all, another persona's and a
    baseline's, and measure the answers. What is stored already is not asked again."""
    from persona_pruner.run.main import evaluate_masks

    raise typer.Exit(evaluate_masks(output, config, set_, persona, sample))


@app.command()
def benchmark(
    output: OutputArgument,
    config: ConfigOption,
    persona: PersonaOption,
    set_: SetOption = [],  # noqa: B006
    rivals: Annotated[
        bool,
        typer.Option(
            "--rivals",
            help="Also under one mask for all and evaluation.answers.baselines, as wide as the first persona's mask.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the tasks of evaluation.benchmarks with lm-eval, unpruned and under the masks of these personas."""
    from persona_pruner.backbone.load import load_backbone
    from persona_pruner.config.load import load_config
    from persona_pruner.errors import ConfigError
    from persona_pruner.evaluation.benchmarks import COLUMNS, rivals_of
    from persona_pruner.evaluation.benchmarks import benchmark as run
    from persona_pruner.storage.open import open_storage

    settings = load_config(config, set_)
    if not settings.evaluation.benchmarks.tasks:
        raise ConfigError("evaluation.benchmarks.tasks: names no task; set it to tasks of lm-eval, e.g. [arc_easy]")
    backbone = load_backbone(settings.backbone, deepspeed=False)
    storage = open_storage(output, settings.storage)
    others = rivals_of(backbone, settings, storage, persona[0]) if rivals else []
    rows = run(backbone, storage, settings.evaluation.benchmarks, persona, others)
    if as_json:
        print(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows], indent=1))
        return
    table = Table(*(Column(name, overflow="fold") for name in COLUMNS), box=None)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    console.print(table)


@app.command()
def report(
    output: OutputArgument,
    seeds: Annotated[str | None, typer.Option(help="Output of the same personas from another seed.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="Compare descriptions by this transformers model, not by their words.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="The backbone, to count parameters and FLOPs.")] = None,
) -> None:
    """Write report.html below the output: one file that opens in any browser, without a network."""
    from persona_pruner.evaluation.report.render import ReportOptions, write_report
    from persona_pruner.storage import keys
    from persona_pruner.storage.open import open_storage

    storage, other = open_storage(output), open_storage(seeds) if seeds else None
    for one in filter(None, (storage, other)):
        one.check_readable(keys.MASKS)
    say(f"{storage.url}/{write_report(storage, ReportOptions(other, embeddings, backbone))}")


@app.command()
def gate(
    output: OutputArgument,
    min_: Annotated[list[str], typer.Option("--min", help="Least value, e.g. first=0.5; may be given again.")] = [],  # noqa: B006
    max_: Annotated[list[str], typer.Option("--max", help="Most, e.g. rank=2; may be given again.")] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """List the masks that do not reach what is asked of the evaluation's columns, or were not evaluated, and exit with
    status 3 where there is one."""
    from persona_pruner.evaluation.summary import failing
    from persona_pruner.masks.store import MaskStore

    table = MaskStore(output).table()
    failures = failing(table, min_, max_)
    if as_json:
        print(json.dumps({"masks": table.num_rows, "failing": failures}, indent=1))
    else:
        for persona_id, reasons in failures.items():
            say(f"{persona_id}: {', '.join(reasons)}")
        say(f"{table.num_rows - len(failures)} of {table.num_rows} masks pass")
    if failures:
        raise typer.Exit(EXIT_PERSONAS_FAILED)
