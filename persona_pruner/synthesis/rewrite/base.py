"""What every rewriting backend takes and gives."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import UserError
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.sources import Question


class RewriteError(UserError):
    """The rewriting backend cannot start: the run cannot go on."""


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. `sample` numbers the answers of one persona to one question from 0."""

    persona: Persona
    question: Question
    sample: int


@dataclass(frozen=True)
class Answer:
    text: str
    finished: bool
    """False where the answer was cut off at the token limit."""


class Rewriter(Protocol):
    model: str
    """What the rows name as the model that answered."""

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request, in their order; an empty text where the backend refuses a question.

        Raises PersonaError, EndpointError, RewriteError.
        """


def messages(config: RunConfig, persona: Persona, question: Question) -> list[dict[str, str]]:
    """The chat that asks another model for an answer in the persona's voice."""
    values = {"persona": persona.description, "question": question.text}
    template = config.prompt.rewrite
    if config.synthesis.rewrite.with_original and question.answer:
        template = config.prompt.rewrite_with_reference
        values["answer"] = question.answer
    system = config.prompt.rewrite_system
    if system is None:
        system = config.prompt.system
    chat = [{"role": "system", "content": fill(system, values)}] if system else []
    for asked, answered in question.earlier:
        chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*chat, {"role": "user", "content": fill(template, values)}]


def fill(template: str, values: dict[str, str]) -> str:
    """`template` with each {name} replaced by its value. Braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)
