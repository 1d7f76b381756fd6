"""What masks are worth: answers of every persona under every arm, measured. The same as `persona-pruner evaluate`.

    python jobs/evaluate_masks.py runs/quickstart --config manifests/quickstart/run.yaml

On a cluster: ray job submit --working-dir . -- python jobs/evaluate_masks.py s3://... --config C
"""

from typing import Annotated

import typer

from persona_pruner.run.main import evaluate_masks, exit_status


def evaluate(
    output: Annotated[str, typer.Argument(help="Output of a run: a directory or s3://bucket/prefix.")],
    config: Annotated[str, typer.Option(help="Run configuration (YAML).")],
    set_: Annotated[list[str], typer.Option("--set", help="Override a setting: evaluation.answers.questions=4.")] = [],  # noqa: B006
    persona: Annotated[list[str], typer.Option(help="Id of a persona; may be given again.")] = [],  # noqa: B006
    sample: Annotated[int | None, typer.Option(min=1, help="Only so many personas, drawn by their ids.")] = None,
) -> None:
    raise typer.Exit(exit_status(lambda: evaluate_masks(output, config, set_, persona, sample)))


if __name__ == "__main__":
    typer.run(evaluate)
