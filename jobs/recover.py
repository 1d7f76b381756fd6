"""Tuning after the mask: LoRA on each pruned model, on the persona's own rows.

    python jobs/recover.py runs/quickstart --config manifests/quickstart/run.yaml --set recovery.steps=60

On a cluster: ray job submit --working-dir . -- python jobs/recover.py s3://... --config C
"""

import typer

from persona_pruner.cli.options import ConfigOption, OutputArgument, PersonaOption, SetOption
from persona_pruner.run.main import exit_status
from persona_pruner.run.recover import recover_masks


def recover(
    output: OutputArgument,
    config: ConfigOption,
    set_: SetOption = [],  # noqa: B006
    persona: PersonaOption = [],  # noqa: B006
) -> None:
    raise typer.Exit(exit_status(lambda: recover_masks(output, config, set_, persona)))


if __name__ == "__main__":
    typer.run(recover)
