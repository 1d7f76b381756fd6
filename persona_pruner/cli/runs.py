"""Commands about a run: what it would do, starting it, where it is, what it asked."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from persona_pruner.cli.app import app, console, say, show
from persona_pruner.cli.options import (
    ConfigOption,
    JsonOption,
    LimitOption,
    ManifestArgument,
    OutputArgument,
    OutputOption,
    PartOption,
    PersonaIdOption,
    SetOption,
)


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where the files go.")] = Path(),
    backbone: Annotated[str | None, typer.Option(help="Your model: a directory, s3:// prefix or hub name.")] = None,
    questions: Annotated[list[str], typer.Option(help="A file or data set of questions; may be given again.")] = [],  # noqa: B006
    personas: Annotated[str | None, typer.Option(help="Your personas, to be checked too.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Start a run of your own: a commented run.yaml for your model and questions; without any, the packaged example."""
    from persona_pruner.errors import UserError
    from persona_pruner.run.init import copy_example, write_config

    if (backbone is None) != (not questions):
        raise UserError("give --backbone and --questions for a configuration of your own, or neither for the example")
    if backbone is None:
        files, manifest = copy_example(directory), str(directory / "personas.jsonl")
    else:
        files, manifest = [write_config(directory, backbone, questions, personas)], personas or "PERSONAS"
    wrote = [str(file) for file in files]
    step = f"persona-pruner run {manifest} --config {directory / 'run.yaml'} --output {directory / 'output'}"
    if as_json:
        show({"wrote": wrote, "next": step}, True)
    else:
        say(f"wrote {', '.join(wrote)}\nnext:  {step}")


@app.command()
def validate(manifest: ManifestArgument, as_json: JsonOption = False) -> None:
    """Check a manifest: every fault with its row, in one go. Reads only."""
    from persona_pruner.manifest import read_manifest

    personas = read_manifest(manifest)
    if as_json:
        show({"manifest": manifest, "personas": len(personas.personas), "warnings": list(personas.warnings)}, True)
        return
    for warning in personas.warnings:
        say(f"warning: {warning}")
    say(f"{manifest}: {len(personas.personas)} personas, no faults")


@app.command()
def plan(
    manifest: ManifestArgument,
    config: ConfigOption,
    output: OutputOption,
    set_: SetOption = [],  # noqa: B006
    gpu: Annotated[Literal["h100", "h200", "a100", "l40s"], typer.Option(help="Estimate for this kind.")] = "h100",
    as_json: JsonOption = False,
) -> None:
    """Say what a submission would do: done, to do, tokens, FLOP, GPU-hours. Starts and writes nothing."""
    from persona_pruner.config.load import load_config
    from persona_pruner.manifest import read_manifest
    from persona_pruner.run.start import JobRequest, check_and_plan

    settings = load_config(config, set_)
    personas = read_manifest(manifest)
    start = check_and_plan(JobRequest(config=settings, manifest=personas, output=output))
    from persona_pruner.run.cost import GPUS, forecast_plan

    expected = forecast_plan(start.identity, start.plan, GPUS[gpu])
    cost = expected.to_dict() if as_json else expected.describe(gpu)
    show({"run_id": start.identity.run_id, "personas": len(personas.personas)} | start.plan.summary() | cost, as_json)


@app.command()
def run(
    manifest: ManifestArgument,
    config: ConfigOption,
    output: OutputOption,
    set_: SetOption = [],  # noqa: B006
    limit: LimitOption = None,
    part: PartOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the masks: synthesize, train, evaluate what is missing. On a local Ray, or on the cluster of RAY_ADDRESS."""
    from persona_pruner.run.main import Command
    from persona_pruner.run.main import run as run_command

    command = Command(
        manifest=manifest, config=config, output=output, overrides=set_, limit=limit, part=part, as_json=as_json
    )
    raise typer.Exit(run_command(command))


@app.command()
def submit(
    manifest: ManifestArgument,
    config: ConfigOption,
    output: OutputOption,
    address: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS")] = "http://127.0.0.1:8265",
    working_dir: Annotated[
        str | None,
        typer.Option(help="Ship this directory, e.g. a checkout; else only what the job reads."),
    ] = None,
    set_: SetOption = [],  # noqa: B006
    limit: LimitOption = None,
    part: PartOption = None,
    env: Annotated[list[str], typer.Option(help="Pass this variable of your environment to the job.")] = [],  # noqa: B006
    wait: Annotated[bool, typer.Option(help="Follow the log to the end.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run `persona-pruner run` on a Ray cluster and follow its log. Exits with the job's own exit status."""
    from persona_pruner.config.load import load_config
    from persona_pruner.run.preflight import preflight_before_submission
    from persona_pruner.run.submit import Submission, submit_run

    settings = load_config(config, set_) if Path(config).is_file() else None
    if settings is not None:
        preflight_before_submission(settings)
    options = [word for value in set_ for word in ("--set", value)]
    options += ["--limit", str(limit)] if limit is not None else []
    options += ["--part", part] if part is not None else []
    submission = Submission(
        manifest=manifest, config=config, output=output, options=options, address=address, working_dir=working_dir,
        env=env,
    )  # fmt: skip
    raise typer.Exit(submit_run(submission, settings, wait, print_json=as_json))


@app.command()
def status(output: OutputArgument, as_json: JsonOption = False) -> None:
    """Where a run is: running, stopped, dead or done; phases, personas by state; what failed and why."""
    from persona_pruner.run.status import describe, read_statuses
    from persona_pruner.storage import keys
    from persona_pruner.storage.open import AT_START, open_storage

    storage = open_storage(output, AT_START)
    storage.check_readable(keys.ERRORS)
    statuses = read_statuses(storage)
    errors = [json.loads(storage.get(item.key)) for item in storage.list(keys.ERRORS)]
    if as_json:
        one = statuses[0] if len(statuses) == 1 else {"parts": statuses}
        show(one | {"errors": errors}, True)
        return
    for job in statuses:
        for line in describe(job, output):
            say(line)
    for error in errors:
        say(f"failed {error['persona_id']} ({error['cause']}, {error['attempts']} attempts): {error['message']}")


@app.command()
def inspect(
    output: OutputArgument,
    persona: PersonaIdOption,
    count: Annotated[int, typer.Option(min=1, help="Questions and answers to show.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Which questions reveal a persona most and least, and how it answers them."""
    from persona_pruner.storage import keys
    from persona_pruner.storage.open import open_storage
    from persona_pruner.synthesis.inspect import inspect_persona, render

    storage = open_storage(output)
    storage.check_readable(keys.SYNTHESIS)
    inspection = inspect_persona(storage, persona, count)
    if as_json:
        show(inspection, True)
    else:
        console.print(render(inspection))


@app.command("list")
def list_(output: OutputArgument, as_json: JsonOption = False) -> None:
    """Every persona of a run: how far it is, its held-out losses, and the size of its mask."""
    import dataclasses

    from rich.table import Table

    from persona_pruner.run.listing import list_personas
    from persona_pruner.storage import keys
    from persona_pruner.storage.open import AT_START, open_storage

    storage = open_storage(output, AT_START)
    storage.check_readable(keys.MASKS)
    listings = list_personas(storage)
    if as_json:
        print(json.dumps([dataclasses.asdict(listing) for listing in listings], indent=1))
        return
    if not listings:
        say(f"{output}: no persona has left anything here")
        return
    table = Table("persona", "state", box=None)
    for name in ("ratio", "unpruned", "masked", "bytes"):
        table.add_column(name, justify="right")
    for one in listings:
        losses = ("" if loss is None else f"{loss:.3f}" for loss in (one.unpruned_loss, one.masked_loss))
        table.add_row(one.persona_id, one.state, str(one.ratio or ""), *losses, str(one.bytes or ""))
    console.print(table, markup=False)
    sizes = [one.bytes for one in listings if one.bytes]
    say(f"{len(sizes)} masks of {len(listings)} personas, {sum(sizes):,} bytes in all")
