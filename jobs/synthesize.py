"""Data only: personas in, one Parquet file of questions and answers each.

    python jobs/synthesize.py manifests/quickstart/personas.jsonl \
        --config manifests/quickstart/run.yaml --output runs/quickstart

On a cluster: ray job submit --working-dir . -- python jobs/synthesize.py MANIFEST --config C --output s3://...
"""

from typing import Annotated

import typer

from persona_pruner.run.main import Command, exit_status, run


def synthesize(
    manifest: Annotated[str, typer.Argument(help="Persona rows: .jsonl, .csv or .parquet, local or s3://.")],
    config: Annotated[str, typer.Option(help="Run configuration (YAML).")],
    output: Annotated[str, typer.Option(help="Where everything goes: a directory or s3://bucket/prefix.")],
    set_: Annotated[list[str], typer.Option("--set", help="Override a setting: learning.ratio=0.25.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N personas.")] = None,
    part: Annotated[str | None, typer.Option(help="Only this part of the manifest, e.g. 3/10.")] = None,
) -> None:
    command = Command(
        manifest=manifest, config=config, output=output, overrides=set_, limit=limit, part=part, training=False
    )
    raise typer.Exit(exit_status(lambda: run(command)))


if __name__ == "__main__":
    typer.run(synthesize)
