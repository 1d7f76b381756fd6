"""Tuning after the mask: LoRA on each pruned model, on the persona's own rows.

    python jobs/recover.py runs/quickstart --config manifests/quickstart/run.yaml --set recovery.steps=60

On a cluster: ray job submit --working-dir . -- python jobs/recover.py s3://... --config C
"""

from typing import Annotated

import typer

from persona_pruner.run.main import exit_status
from persona_pruner.run.recover import recover_masks


def recover(
    output: Annotated[str, typer.Argument(help="Output of a run: a directory or s3://bucket/prefix.")],
    config: Annotated[str, typer.Option(help="Run configuration (YAML).")],
    set_: Annotated[list[str], typer.Option("--set", help="Override a setting: recovery.rank=16.")] = [],  # noqa: B006
    persona: Annotated[list[str], typer.Option(help="Id of a persona; may be given again.")] = [],  # noqa: B006
) -> None:
    raise typer.Exit(exit_status(lambda: recover_masks(output, config, set_, persona)))


if __name__ == "__main__":
    typer.run(recover)
