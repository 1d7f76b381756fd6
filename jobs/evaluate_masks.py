"""What masks are worth: answers of every persona under every arm, measured. The same as `persona-pruner evaluate`.

    python jobs/evaluate_masks.py runs/quickstart --config manifests/quickstart/run.yaml

On a cluster: ray job submit --working-dir . -- python jobs/evaluate_masks.py s3://... --config C
"""

import typer

from persona_pruner.cli.options import ConfigOption, OutputArgument, PersonaOption, SampleOption, SetOption
from persona_pruner.run.main import evaluate_masks, exit_status


def evaluate(
    output: OutputArgument,
    config: ConfigOption,
    set_: SetOption = [],  # noqa: B006
    persona: PersonaOption = [],  # noqa: B006
    sample: SampleOption = None,
) -> None:
    raise typer.Exit(exit_status(lambda: evaluate_masks(output, config, set_, persona, sample)))


if __name__ == "__main__":
    typer.run(evaluate)
