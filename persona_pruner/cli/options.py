"""Arguments and options that more than one command or job takes: jobs/ and the commands say them in the same words."""

from typing import Annotated

import typer

ManifestArgument = Annotated[str, typer.Argument(help="Persona rows: .jsonl, .csv or .parquet, local or s3://.")]
OutputArgument = Annotated[str, typer.Argument(help="Output of a run: a directory or s3://bucket/prefix.")]
ConfigOption = Annotated[str, typer.Option(help="Run configuration (YAML).")]
OutputOption = Annotated[str, typer.Option(help="Where everything goes: a directory or s3://bucket/prefix.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Override a setting, e.g. learning.ratio=0.25.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first N personas.")]
PartOption = Annotated[str | None, typer.Option(help="Only this part of the manifest, e.g. 3/10.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts, errors too.")]
PersonaOption = Annotated[list[str], typer.Option("--persona", help="Id of a persona; may be given again.")]
PersonaIdOption = Annotated[str, typer.Option("--persona", help="Id of the persona.")]
SampleOption = Annotated[int | None, typer.Option(min=1, help="Only so many personas, drawn by their ids.")]
WhereOption = Annotated[list[str], typer.Option(help="Only masks with, e.g., ratio==0.5; may be given again.")]
BackboneOption = Annotated[str, typer.Option(help="The backbone that the masks were made for.")]
