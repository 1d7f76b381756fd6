"""Commands that publish what a run has made: card, push."""

import json
from typing import Annotated

import typer

from persona_pruner.cli.app import app, say
from persona_pruner.cli.options import JsonOption, OutputArgument

HUB_EXAMPLE = "hf://OWNER/NAME"
BaseModelOption = Annotated[str | None, typer.Option(help="The backbone's name on the hub, for the card's metadata.")]


@app.command()
def card(
    output: OutputArgument,
    to: Annotated[str, typer.Option(help="Where it will be read: readers are told to load from there.")] = HUB_EXAMPLE,
    base_model: BaseModelOption = None,
) -> None:
    """Print a model card for these masks, with Hugging Face's metadata. Stored as README.md in the output, and changed
    as you like, it is what `push` publishes."""
    from persona_pruner.evaluation.report.card import model_card
    from persona_pruner.evaluation.report.data import read_report_data
    from persona_pruner.storage import keys
    from persona_pruner.storage.open import open_storage

    storage = open_storage(output)
    storage.check_readable(keys.MASKS)
    print(model_card(read_report_data(storage), to=to, base_model=base_model), end="")


@app.command()
def push(
    output: OutputArgument,
    to: Annotated[str, typer.Option(help="hf://owner/name, s3://bucket/prefix or a directory.")],
    checkpoint: Annotated[
        list[str], typer.Option(help="Export this persona's pruned model too; may be given again. Needs --backbone.")
    ] = [],  # noqa: B006
    backbone: Annotated[str | None, typer.Option(help="The backbone of those checkpoints.")] = None,
    base_model: BaseModelOption = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also what others have put there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Publish masks, model card, catalog and report. Only what has changed since the last push is moved, and what
    others have put there is not overwritten."""
    from persona_pruner.evaluation.report.push import PushRequest
    from persona_pruner.evaluation.report.push import push as run

    request = PushRequest(
        output=output, to=to, checkpoints=tuple(checkpoint), backbone=backbone, base_model=base_model,
        private=private, overwrite=overwrite,
    )  # fmt: skip
    pushed = run(request)
    if as_json:
        print(json.dumps({"to": pushed.url, "moved": pushed.moved, "unchanged": pushed.unchanged}, indent=1))
        return
    say(f"{pushed.url}: {len(pushed.moved)} files pushed, {pushed.unchanged} were there already")
