"""Commands that run a backbone under its personas' masks: serve, chat, compare."""

import json
from enum import StrEnum
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from persona_pruner.cli.app import app, console
from persona_pruner.cli.options import BackboneOption, JsonOption, OutputArgument, PersonaIdOption, WhereOption
from persona_pruner.errors import UserError

OtherOption = Annotated[str | None, typer.Option(help="Whose mask to compare with; default: the next persona.")]
TokensOption = Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0 is greedy.")]


class EngineName(StrEnum):
    vllm = "vllm"
    transformers = "transformers"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    output: OutputArgument,
    backbone: BackboneOption,
    engine: Annotated[EngineName | None, typer.Option(help="Default: vllm where it is installed.")] = None,
    address: Annotated[str, typer.Option(help="HOST:PORT to listen at.")] = "127.0.0.1:8000",
    name: Annotated[str | None, typer.Option(help="Name of the backbone in the API; default: its directory.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights as they run.")] = Dtype.float32,
    slots: Annotated[int, typer.Option(min=1, help="Masks that lie beside the backbone at once.")] = 1024,
    compact: Annotated[int, typer.Option(min=0, help="vllm: sets of compact FFN weights to keep.")] = 0,
    manifest: Annotated[str | None, typer.Option(help="Descriptions for masks that carry none.")] = None,
    where: WhereOption = [],  # noqa: B006
    refresh_seconds: Annotated[float, typer.Option(min=0, help="Read a mask again when it is this old.")] = 5.0,
    api_key: Annotated[list[str], typer.Option(envvar="VLLM_API_KEY", help="Clients must send one of these.")] = [],  # noqa: B006
) -> None:
    """Serve every persona of a run over the OpenAI API, all in one batch on one backbone.

    model: "<backbone>:<persona>" or the persona id. With --engine vllm all further arguments go to vLLM.
    """
    from persona_pruner.serving.server import ServeOptions, default_engine
    from persona_pruner.serving.server import serve as run

    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--address {address!r}: write HOST:PORT, e.g. 0.0.0.0:8000")
    chosen = engine.value if engine else default_engine()
    if context.args and chosen != "vllm":
        raise UserError(f"unknown argument {context.args[0]!r}: only --engine vllm takes further arguments")
    run(
        ServeOptions(
            output=output, backbone=backbone, engine=chosen, host=host, port=int(port), name=name, dtype=dtype.value,
            slots=slots, compact=compact, manifest=manifest, where=tuple(where), refresh_seconds=refresh_seconds,
            api_keys=tuple(api_key), engine_arguments=tuple(context.args),
        )
    )  # fmt: skip


@app.command()
def chat(
    output: OutputArgument,
    backbone: BackboneOption,
    persona: PersonaIdOption,
    compare: Annotated[bool, typer.Option("--compare", help="Also unpruned and under another's mask.")] = False,
    other: OtherOption = None,
    max_tokens: TokensOption = 160,
    temperature: TemperatureOption = 0.7,
) -> None:
    """Talk to a persona in the terminal; an empty line ends it. With --compare, side by side with other masks."""
    from persona_pruner.serving.chat import PersonaChat, Sampling

    partner = PersonaChat(output, backbone, persona, other)
    conversation: list[dict[str, str]] = []
    while question := console.input("[bold]you:[/] ").strip():
        sampling = Sampling(max_tokens, temperature, seed=len(conversation))
        conversation.append({"role": "user", "content": question})
        under = partner.names if compare else [persona]
        answers = {name: partner.answer(conversation, name, sampling) for name in under}
        console.print(_side_by_side(answers)) if compare else console.print(
            f"{persona}: {answers[persona]}", markup=False
        )
        conversation.append({"role": "assistant", "content": answers[persona]})


@app.command()
def compare(
    output: OutputArgument,
    backbone: BackboneOption,
    persona: PersonaIdOption,
    question: Annotated[list[str], typer.Option(help="May be given again.")],
    other: OtherOption = None,
    with_global: Annotated[bool, typer.Option("--with-global", help="Also under the run's one mask for all.")] = False,
    max_tokens: TokensOption = 160,
    temperature: TemperatureOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Answer questions as a persona on the whole backbone, under its own mask and under another persona's."""
    from persona_pruner.serving.chat import PersonaChat, Sampling

    partner = PersonaChat(output, backbone, persona, other, with_global=with_global)
    sampling = Sampling(max_tokens, temperature)
    answers = {text: partner.compare(text, sampling) for text in question}
    if as_json:
        print(json.dumps(answers, indent=1))
        return
    for text, by_mask in answers.items():
        console.print(_side_by_side(by_mask, title=text))


def _side_by_side(answers: dict[str, str], title: str | None = None) -> Table:
    table = Table(title=title and escape(title), title_justify="left", show_lines=True)
    for name in answers:
        table.add_column(escape(name), ratio=1)
    table.add_row(*map(escape, answers.values()))
    return table
