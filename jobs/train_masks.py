"""Masks only: trains the personas whose data jobs/synthesize.py has made.

    python jobs/train_masks.py manifests/quickstart/personas.jsonl \
        --config manifests/quickstart/run.yaml --output runs/quickstart

On a cluster: ray job submit --working-dir . -- python jobs/train_masks.py MANIFEST --config C --output s3://...
"""

import typer

from persona_pruner.cli.options import ConfigOption, LimitOption, ManifestArgument, OutputOption, PartOption, SetOption
from persona_pruner.run.main import Command, exit_status, run


def train(
    manifest: ManifestArgument,
    config: ConfigOption,
    output: OutputOption,
    set_: SetOption = [],  # noqa: B006
    limit: LimitOption = None,
    part: PartOption = None,
) -> None:
    command = Command(
        manifest=manifest, config=config, output=output, overrides=set_, limit=limit, part=part, synthesis=False
    )
    raise typer.Exit(exit_status(lambda: run(command)))


if __name__ == "__main__":
    typer.run(train)
