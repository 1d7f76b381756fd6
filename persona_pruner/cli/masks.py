"""Commands for whoever deploys masks."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from persona_pruner.cli.app import app, console, say, show
from persona_pruner.cli.options import JsonOption, OutputArgument, PersonaIdOption, PersonaOption, WhereOption
from persona_pruner.errors import UserError

catalog_app = typer.Typer(help="The index of all masks, catalog/*.parquet.", no_args_is_help=True)
app.add_typer(catalog_app, name="catalog")


class PullFormat(StrEnum):
    mask = "mask"
    indices = "keep-indices"


@app.command()
def pull(
    output: OutputArgument,
    to: Annotated[Path, typer.Option(help="Directory to write to.")],
    persona: PersonaOption = [],  # noqa: B006
    where: WhereOption = [],  # noqa: B006
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
    if not ids:
        raise UserError(f"{output}: holds no mask{''.join(f', {condition}' for condition in where)}")
    pulled = [(p.persona_id, str(p.path), p.fresh) for p in store.pull(ids, to, indices=form is PullFormat.indices)]
    if as_json:
        print(json.dumps([{"persona_id": i, "path": path, "fresh": fresh} for i, path, fresh in pulled], indent=1))
        return
    fresh = sum(entry[2] for entry in pulled)
    say(f"{fresh} masks pulled and verified, {len(pulled) - fresh} were there already: {to}")


@app.command()
def verify(output: OutputArgument, as_json: JsonOption = False) -> None:
    """Read every mask of a run, or of a directory that was pulled, and check it bit by bit."""
    from persona_pruner.masks.store import MaskStore

    count = MaskStore(output).verify()
    if not count:
        raise UserError(f"{output}: holds no mask (masks/<2 hex>/<id>/mask.safetensors)")
    show({"verified": count, "output": output}, True) if as_json else say(f"{output}: {count} masks, all verify")


@app.command()
def export(
    mask: Annotated[str, typer.Argument(help="A mask.safetensors: a file or s3:// object.")],
    backbone: Annotated[str, typer.Option(help="The backbone that it was made for.")],
    to: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    compact: Annotated[bool, typer.Option(help="Layers of different width, for persona-pruner's own loader.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a smaller Hugging Face checkpoint with only the kept channels, and compare it with the masked backbone."""
    from persona_pruner.backbone.export import export_pruned
    from persona_pruner.config.load import check_config
    from persona_pruner.masks.format import Mask
    from persona_pruner.storage.open import read_url

    settings = check_config({"backbone": {"path": backbone, "dtype": dtype}}, "--backbone/--dtype")
    figures = export_pruned(Mask.from_bytes(read_url(mask), mask), settings.backbone, to, compact=compact)
    if as_json:
        show({"checkpoint": str(to)} | figures, True)
        return
    table = Table("", box=None)
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    for name in ("parameters", "bytes", "tokens_per_second"):
        table.add_row(name.replace("_", " "), *(f"{figures[f'{name}_{at}']:,.0f}" for at in ("before", "after")))
    console.print(table)
    say(
        f"{to}: same top token as the masked backbone at {figures['top_token_agreement']:.1%} of positions, "
        f"largest difference of a logit {figures['logit_difference']:.2g}"
    )
    if figures["padded_channels"]:
        say("the layers keep different numbers of channels: padded with zeros to the widest; --compact leaves them out")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="Index file of the published code: .pt or .json.")],
    output: Annotated[str, typer.Option(help="Where the mask goes: a directory or s3://bucket/prefix.")],
    persona: PersonaIdOption,
    backbone: Annotated[str, typer.Option(help="The model that the indices were made for.")],
    description: Annotated[str, typer.Option(help="The persona's description.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Store an index file as the mask of a persona."""
    from persona_pruner.backbone.channels import find_ffns
    from persona_pruner.backbone.load import load_backbone
    from persona_pruner.config.schema import BackboneConfig
    from persona_pruner.manifest import ID, Persona
    from persona_pruner.masks.store import MaskStore

    if not ID.fullmatch(persona):
        raise UserError(f"--persona {persona!r}: ids are letters, digits, '.', '_', '-', at most 128 of them")
    model = load_backbone(BackboneConfig(path=backbone), deepspeed=False)
    ffns = find_ffns(model.model)
    mask = MaskStore(output).import_indices(
        file, Persona(persona, description), layers=len(ffns), channels=ffns[0].channels, backbone=model.name,
        backbone_fingerprint=model.fingerprint,
    )  # fmt: skip
    show({"persona": persona, "kept": sum(mask.metadata.kept), "layers": mask.metadata.layers}, as_json)


@catalog_app.command("rebuild")
def catalog_rebuild(output: OutputArgument, as_json: JsonOption = False) -> None:
    """Make the catalog again from the masks themselves."""
    from persona_pruner.masks.catalog import update_catalog
    from persona_pruner.masks.store import MaskStore
    from persona_pruner.storage import keys

    storage = MaskStore(output).storage
    show({"masks": update_catalog(storage, fresh=True), "catalog": f"{storage.url}/{keys.CATALOG}"}, as_json)


@app.command()
def gc(
    output: OutputArgument,
    dry_run: Annotated[bool, typer.Option(help="Only list what would be removed.")] = True,
    data: Annotated[bool, typer.Option("--data", help="Questions and answers too; inspect needs them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List or remove what no run needs any more: checkpoints, stored answers and errors of personas that have a mask,
    and uploads that were never finished."""
    from persona_pruner.masks.store import MaskStore, garbage, orphans

    storage = MaskStore(output).storage
    keys = garbage(storage, data=data)
    if not dry_run:
        for key in keys:
            storage.delete(key)
    keys += orphans(storage, remove=not dry_run)
    if as_json:
        show({"keys": keys, "removed": not dry_run}, True)
        return
    for key in keys:
        say(key)
    say(f"{len(keys)} objects {'would be removed; say --no-dry-run to do it' if dry_run else 'removed'}")


@app.command()
def share(
    output: OutputArgument,
    persona: PersonaIdOption,
    seconds: Annotated[int, typer.Option(min=1, max=604800, help="How long the link works.")] = 3600,
    as_json: JsonOption = False,
) -> None:
    """Print a link that reads one mask without credentials."""
    from persona_pruner.masks.store import MaskStore

    link = MaskStore(output).share(persona, seconds)
    print(json.dumps({"persona": persona, "url": link, "seconds": seconds}) if as_json else link)
