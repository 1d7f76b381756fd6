"""The command that looks at a cluster."""

import json
from typing import Annotated

import typer
from rich.text import Text

from persona_pruner.cli.app import app, console
from persona_pruner.cli.options import JsonOption


@app.command()
def doctor(
    output: Annotated[str | None, typer.Option(help="An output to look at: a directory or s3://bucket/prefix.")] = None,
    config: Annotated[str | None, typer.Option(help="A run configuration, whose backbone every node reads.")] = None,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster: auto or HOST:PORT from one of its nodes, http://HEAD:8265 from elsewhere."),
    ] = None,
    env: Annotated[list[str], typer.Option(help="With http://: pass this variable of your environment on.")] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Look whether everything that a job needs is in place, on every node; exits with 1 where something is not."""
    if address and address.startswith(("http://", "https://")):
        raise typer.Exit(_diagnose_by_job(address, output, config, env, as_json))
    from persona_pruner.config.load import load_config
    from persona_pruner.run.doctor import diagnose

    findings = []
    for finding in diagnose(load_config(config) if config else None, output, address):
        findings.append(finding)
        if as_json:
            continue
        mark, style = {True: ("ok ", "green"), False: ("RED", "red"), None: ("-  ", "dim")}[finding.ok]
        console.print(Text.assemble((mark, style), f" {finding.name}: {finding.detail}"), soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"    do: {finding.remedy}"), soft_wrap=True)
    red = sum(finding.ok is False for finding in findings)
    if as_json:
        print(json.dumps({"ok": not red, "findings": [finding.to_dict() for finding in findings]}, indent=1))
    else:
        console.print(f"{red} things to mend" if red else "everything is in place", highlight=False)
    raise typer.Exit(1 if red else 0)


def _diagnose_by_job(address: str, output: str | None, config: str | None, env: list[str], as_json: bool) -> int:
    """The same as a job on the cluster, whose log is printed here."""
    from persona_pruner.run.submit import submit_job

    command = ["persona-pruner", "doctor"]  # a job finds its cluster in RAY_ADDRESS
    for name, value in (("--output", output), ("--config", config)):
        command += [name, value] if value else []
    command += ["--json"] if as_json else []
    return submit_job(command, address, ".", env, True, print_json=as_json)
