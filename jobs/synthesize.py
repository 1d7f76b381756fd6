"""Data only: personas in, one Parquet file of questions and answers each.

    python jobs/synthesize.py manifests/quickstart/personas.jsonl \
        --config manifests/quickstart/run.yaml --output runs/quickstart

On a cluster: ray job submit --working-dir . -- python jobs/synthesize.py MANIFEST --config C --output s3://...
"""

from typing import Annotated

import typer
from rich.console import Console

from persona_pruner.config.load import load_config
from persona_pruner.manifest import Manifest, read_manifest
from persona_pruner.run.job import main, run_job


def synthesize(
    manifest: Annotated[str, typer.Argument(help="Persona rows: .jsonl, .csv or .parquet, local or s3://.")],
    config: Annotated[str, typer.Option(help="Run configuration (YAML).")],
    output: Annotated[str, typer.Option(help="Where everything goes: a directory or s3://bucket/prefix.")],
    set_: Annotated[list[str], typer.Option("--set", help="Override a setting: learning.ratio=0.25.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N personas.")] = None,
) -> None:
    def run() -> int:
        settings = load_config(config, set_)
        personas = read_manifest(manifest)
        if limit is not None:
            personas = Manifest(personas.source, personas.personas[:limit], personas.warnings)
        return run_job(settings, personas, output, console=Console(), training=False)

    raise typer.Exit(main(run))


if __name__ == "__main__":
    typer.run(synthesize)
