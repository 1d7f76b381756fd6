"""The `persona-pruner` command. Each command calls one function of the package and prints what it gives."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from persona_pruner.errors import UserError

app = typer.Typer(
    help="One FFN-channel mask per persona on one frozen, shared LLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
catalog_app = typer.Typer(help="The index of all masks, catalog.parquet.", no_args_is_help=True)
app.add_typer(catalog_app, name="catalog")
console = Console()

ManifestArgument = Annotated[str, typer.Argument(help="Persona rows: .jsonl, .csv or .parquet, local or s3://.")]
OutputArgument = Annotated[str, typer.Argument(help="Output of a run: a directory or s3://bucket/prefix.")]
ConfigOption = Annotated[str, typer.Option(help="Run configuration (YAML).")]
OutputOption = Annotated[str, typer.Option(help="Where everything goes: a directory or s3://bucket/prefix.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a setting, e.g. learning.ratio=0.25.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
PersonaOption = Annotated[list[str], typer.Option("--persona", help="Id of a persona; may be given again.")]


class PullFormat(StrEnum):
    mask = "mask"
    indices = "keep-indices"


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=1, default=str))
        return
    for name, value in values.items():
        _say(f"{name.replace('_', ' ')}: {value}")


@app.command()
def validate(manifest: ManifestArgument, as_json: JsonOption = False) -> None:
    """Check a manifest: every fault with its row, in one go. Reads only."""
    from persona_pruner.manifest import read_manifest

    found = read_manifest(manifest)
    if as_json:
        _show({"manifest": manifest, "personas": len(found.personas), "warnings": list(found.warnings)}, True)
        return
    for warning in found.warnings:
        _say(f"warning: {warning}")
    _say(f"{manifest}: {len(found.personas)} personas, no faults")


@app.command()
def plan(
    manifest: ManifestArgument,
    config: ConfigOption,
    output: OutputOption,
    set_: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Say what a submission would do: done, to do, tokens, FLOP and storage. Starts and writes nothing."""
    from persona_pruner.config.load import load_config
    from persona_pruner.manifest import read_manifest
    from persona_pruner.run.plan import check_run, identify, make_plan
    from persona_pruner.storage import keys
    from persona_pruner.storage.open import open_storage

    settings = load_config(config, set_)
    personas = read_manifest(manifest)
    storage = open_storage(output, settings.storage)
    storage.check_readable(keys.MASKS)
    identity = identify(settings)
    check_run(storage, identity)
    found = make_plan(personas, storage, identity).summary()
    if not as_json:
        found |= {"flop": f"about {found['flop']:.2e}", "bytes": f"about {found['bytes']:,} for the masks"}
        found |= {"tokens": f"about {found['tokens']:,}"}
    _show({"run_id": identity.run_id, "personas": len(personas.personas)} | found, as_json)


@app.command()
def submit(
    manifest: ManifestArgument,
    config: ConfigOption,
    output: OutputOption,
    address: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS")] = "http://127.0.0.1:8265",
    working_dir: Annotated[str, typer.Option(help="Directory that is shipped to the cluster.")] = ".",
    set_: SetOption = [],  # noqa: B006
    env: Annotated[list[str], typer.Option(help="Pass this variable of your environment to the job.")] = [],  # noqa: B006
    wait: Annotated[bool, typer.Option(help="Follow the log to the end.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Submit the main job to a Ray cluster and follow its log. Exits with the job's own exit status."""
    from persona_pruner.run.submit import submit_job

    overrides = [word for value in set_ for word in ("--set", value)]
    command = ["python", "jobs/prune_personas.py", manifest, "--config", config, "--output", output, *overrides]
    raise typer.Exit(submit_job(command, address, working_dir, env, wait, print_json=as_json))


@app.command()
def status(output: OutputArgument, as_json: JsonOption = False) -> None:
    """Where a run is: running, stopped, dead or done; trials by state; what failed and why."""
    from persona_pruner.run.progress import read_status
    from persona_pruner.storage import keys
    from persona_pruner.storage.open import AT_START, open_storage

    storage = open_storage(output, AT_START)
    storage.check_readable(keys.ERRORS)
    found = read_status(storage)
    found["errors"] = [json.loads(storage.get(item.key)) for item in storage.list(keys.ERRORS)]
    if as_json:
        _show(found, True)
        return
    claim = found["holder"]
    _say(f"{output}: {found['state']}, run {found['run_id']}, last word {found['updated']}")
    if claim:
        _say(f"working: host {claim['host']}, pid {claim['pid']}, since {claim['since']}")
    states = ", ".join(f"{count} {name}" for name, count in found["trials"].items() if count)
    _say(f"personas: {found['personas']}, masked before {found['done_before']}, this job: {states or 'nothing'}")
    _say(f"groups: {found['groups']['busy']} busy of {found['groups']['up']}, lost {found['groups_lost']}")
    _say(f"{found['personas_per_hour']} personas per hour, {found['tokens_per_second']} tokens per second")
    if found["eta_seconds"] is not None and found["state"] == "running":
        _say(f"about {found['eta_seconds']} s left")
    for error in found["errors"]:
        _say(f"failed {error['persona_id']} ({error['cause']}, {error['attempts']} attempts): {error['message']}")


@app.command()
def pull(
    output: OutputArgument,
    to: Annotated[Path, typer.Option(help="Directory to write to.")],
    persona: PersonaOption = [],  # noqa: B006
    where: Annotated[list[str], typer.Option(help="Only masks with, e.g., ratio==0.5; may be given again.")] = [],  # noqa: B006
    all_: Annotated[bool, typer.Option("--all", help="Every mask.")] = False,
    form: Annotated[PullFormat, typer.Option("--format", help="Mask objects, or index files (.pt).")] = PullFormat.mask,
    as_json: JsonOption = False,
) -> None:
    """Copy masks out of a run, each verified. What is there and verifies is not fetched again."""
    from persona_pruner.masks.store import MaskStore

    if sum(map(bool, (persona, where, all_))) != 1:
        raise UserError("say which masks: --persona ID (again for more), --where CONDITION, or --all")
    store = MaskStore(output)
    ids = persona or (store.where(where) if where else store.ids())
    pulled = [(p.persona_id, str(p.path), p.fresh) for p in store.pull(ids, to, indices=form is PullFormat.indices)]
    if as_json:
        print(json.dumps([{"persona_id": i, "path": path, "fresh": fresh} for i, path, fresh in pulled], indent=1))
        return
    fresh = sum(entry[2] for entry in pulled)
    _say(f"{fresh} masks pulled and verified, {len(pulled) - fresh} were there already: {to}")


@app.command()
def verify(output: OutputArgument, as_json: JsonOption = False) -> None:
    """Read every mask of a run, or of a directory that was pulled, and check it bit by bit."""
    from persona_pruner.masks.store import MaskStore

    count = MaskStore(output).verify()
    if not count:
        raise UserError(f"{output}: holds no mask (masks/<id>/mask.safetensors)")
    _show({"verified": count, "output": output}, True) if as_json else _say(f"{output}: {count} masks, all verify")


@app.command()
def export(
    mask: Annotated[str, typer.Argument(help="A mask.safetensors: a file or s3:// object.")],
    backbone: Annotated[str, typer.Option(help="The backbone that it was made for.")],
    to: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Write a smaller Hugging Face checkpoint with only the kept channels, and compare it with the masked backbone."""
    from persona_pruner.backbone.export import export_pruned
    from persona_pruner.config.load import check_config
    from persona_pruner.masks.format import Mask
    from persona_pruner.storage.open import read_url

    settings = check_config({"backbone": {"path": backbone, "dtype": dtype}}, "--backbone/--dtype")
    figures = export_pruned(Mask.from_bytes(read_url(mask), mask), settings.backbone, to)
    _show({"checkpoint": str(to)} | figures, as_json)


@app.command()
def inspect(
    output: OutputArgument,
    persona: Annotated[str, typer.Option(help="Id of the persona.")],
    count: Annotated[int, typer.Option(min=1, help="Questions and answers to show.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Which questions reveal a persona most and least, and how it answers them."""
    from persona_pruner.storage import keys
    from persona_pruner.storage.open import open_storage
    from persona_pruner.synthesis.inspect import inspect_persona, render

    storage = open_storage(output)
    storage.check_readable(keys.SYNTHESIS)
    found = inspect_persona(storage, persona, count)
    if as_json:
        _show(found, True)
    else:
        console.print(render(found))


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Index file of the published code: int64 [layers, kept], .pt.")],
    output: Annotated[str, typer.Option(help="Where the mask goes: a directory or s3://bucket/prefix.")],
    persona: Annotated[str, typer.Option(help="Id of the persona.")],
    backbone: Annotated[str, typer.Option(help="The model that the indices were made for.")],
    description: Annotated[str, typer.Option(help="The persona's description.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Store an index file as the mask of a persona."""
    from persona_pruner.backbone.channels import find_ffns
    from persona_pruner.backbone.load import load_backbone
    from persona_pruner.config.schema import BackboneConfig
    from persona_pruner.manifest import ID
    from persona_pruner.masks.store import MaskStore

    if not ID.fullmatch(persona):
        raise UserError(f"--persona {persona!r}: ids are letters, digits, '.', '_', '-', at most 128 of them")
    model = load_backbone(BackboneConfig(path=backbone), deepspeed=False)
    ffns = find_ffns(model.model)
    mask = MaskStore(output).import_indices(
        file, persona, channels=ffns[0].channels, description=description, backbone=model.name,
        backbone_fingerprint=model.fingerprint, layers=len(ffns),
    )  # fmt: skip
    _show({"persona": persona, "kept": mask.metadata.kept, "layers": mask.metadata.layers}, as_json)


@catalog_app.command("rebuild")
def catalog_rebuild(output: OutputArgument, as_json: JsonOption = False) -> None:
    """Make catalog.parquet again from the masks themselves."""
    from persona_pruner.masks.catalog import build_catalog, write_catalog
    from persona_pruner.masks.store import MaskStore
    from persona_pruner.storage import keys

    storage = MaskStore(output).storage
    table = build_catalog(storage, fresh=True)
    write_catalog(storage, table)
    _show({"masks": table.num_rows, "catalog": f"{storage.url}/{keys.CATALOG}"}, as_json)


@app.command()
def gc(
    output: OutputArgument,
    dry_run: Annotated[bool, typer.Option(help="Only list what would be removed.")] = True,
    as_json: JsonOption = False,
) -> None:
    """List or remove what no run needs any more: checkpoints, stored answers and data of personas that have a mask, and
    uploads that were never finished."""
    from persona_pruner.masks.store import MaskStore, garbage, orphans

    storage = MaskStore(output).storage
    keys = garbage(storage)
    if not dry_run:
        for key in keys:
            storage.delete(key)
    keys += orphans(storage, remove=not dry_run)
    if as_json:
        _show({"keys": keys, "removed": not dry_run}, True)
        return
    for key in keys:
        _say(key)
    _say(f"{len(keys)} objects {'would be removed; say --no-dry-run to do it' if dry_run else 'removed'}")


@app.command()
def share(
    output: OutputArgument,
    persona: Annotated[str, typer.Option(help="Id of the persona.")],
    seconds: Annotated[int, typer.Option(min=1, max=604800, help="How long the link works.")] = 3600,
) -> None:
    """Print a link that reads one mask without credentials."""
    from persona_pruner.masks.store import MaskStore

    print(MaskStore(output).share(persona, seconds))


@app.command()
def config(as_json: JsonOption = False) -> None:
    """Explain every setting of a run configuration, with its default."""
    from persona_pruner.config.schema import RunConfig

    if as_json:
        print(json.dumps(RunConfig.model_json_schema(), indent=1))
        return
    table = Table("setting", "default", "what it does", title="run configuration", title_justify="left")
    for name, default, text in _settings(RunConfig):
        table.add_row(name, default, text)
    console.print(table, markup=False)


def _settings(section: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    rows = []
    for name, field in section.model_fields.items():
        default = field.default
        if isinstance(default, BaseModel):
            rows += _settings(type(default), f"{prefix}{name}.")
        else:
            shown = "" if field.is_required() else json.dumps(default, default=str)
            rows.append((prefix + name, shown if len(shown) < 40 else f"{shown[:37]}...", field.description or ""))
    return rows
