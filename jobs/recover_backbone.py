"""Mend a backbone for the masks of an output: its FFN outputs are refitted to the channels that masks leave, then gains
and a low-rank update of its matrices are learned under all masks and folded into its weights.

    python jobs/recover_backbone.py manifests/smollm2/personas.jsonl \
        --config manifests/smollm2/run.yaml --output runs/smollm2 --to runs/smollm2-backbone

The result is a plain checkpoint that takes the backbone's place wherever the masks of that output are used (serving,
export, `chat`). One process, no Ray; the masks do not change. Without its masks it is not the original model any more.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from persona_pruner.cli.options import ConfigOption, ManifestArgument, SetOption
from persona_pruner.run.main import exit_status


def recover(
    manifest: ManifestArgument,
    config: ConfigOption,
    output: Annotated[str, typer.Option(help="Where data and masks are: a directory or s3://bucket/prefix.")],
    to: Annotated[Path, typer.Option(help="Directory of the mended backbone; must not exist yet.")],
    refit_rows: Annotated[int, typer.Option(min=0, help="Rows for the closed-form refit; 0 leaves it out.")] = 1536,
    steps: Annotated[int, typer.Option(min=1, help="Steps, each of two personas' rows.")] = 60,
    rate: Annotated[float, typer.Option(min=0, help="Adam's rate for the gains.")] = 0.01,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the matrices' update; 0: gains alone.")] = 16,
    foreign: Annotated[
        float, typer.Option(min=0, max=0.95, help="Share of rows from learning.objective.generic_rows.")
    ] = 0.5,
    personas: Annotated[int, typer.Option(min=1, help="Masks to learn under, the first of the manifest.")] = 16,
    set_: SetOption = [],  # noqa: B006
) -> None:
    how = {"refit_rows": refit_rows, "steps": steps, "rate": rate, "rank": rank, "foreign": foreign}
    raise typer.Exit(exit_status(lambda: run(manifest, config, output, to, how | {"personas": personas}, set_)))


def run(manifest: str, config: str, output: str, to: Path, how: dict[str, Any], overrides: list[str]) -> int:
    from persona_pruner.config.load import load_config
    from persona_pruner.learning.shared_recovery import Recovery
    from persona_pruner.manifest import read_manifest
    from persona_pruner.run.recover_backbone import recover_backbone
    from persona_pruner.storage.open import open_storage

    settings, rows = load_config(config, overrides), read_manifest(manifest).personas
    recover_backbone(settings, rows, open_storage(output, settings.storage), to, Recovery(**how))
    return 0


if __name__ == "__main__":
    typer.run(recover)
