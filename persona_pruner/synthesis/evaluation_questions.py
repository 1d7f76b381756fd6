"""The questions by which a persona will be evaluated: they never enter its data."""

import json
import re
from collections.abc import Collection
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import PersonaError, StorageError
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import read_url
from persona_pruner.synthesis.sources import comparison_key

_PUBLISHED_JOIN = re.compile(r"\s*\n\s*#{0,4}\s*Input:\s*", re.IGNORECASE)
"""What stands between instruction and input in prompts of the Alpaca form."""


def read_evaluation_questions(config: RunConfig, persona_id: str) -> set[str]:
    """Comparison keys of the persona's file under `evaluation.questions`. Raises PersonaError.

    <id>.json holds a list of questions, or an object with such a list under `questions`; a question is a text, or an
    object with instruction and input. <id>.txt holds one question a line.
    """
    directory = config.evaluation.questions
    if directory is None:
        return set()
    joins = {source.join for source in config.synthesis.sources}
    for name in (f"{persona_id}.json", f"{persona_id}.txt"):
        url = f"{directory}/{name}"
        try:
            text = read_url(url, config.storage).decode("utf-8")
            value = json.loads(text) if name.endswith(".json") else text.splitlines()
        except NotFoundError:
            continue
        except (StorageError, ValueError) as error:
            raise PersonaError("evaluation_questions", f"{url}: not readable: {error}") from None
        questions = value.get("questions", []) if isinstance(value, dict) else value
        return {key for question in questions for key in _keys(question, joins)}
    return set()


def _keys(question: Any, joins: Collection[str]) -> set[str]:
    """A text does not say where its input begins: its keys under every join that may have made it."""
    if isinstance(question, dict):
        return {comparison_key(str(question.get("instruction", "")), str(question.get("input") or ""))}
    if not isinstance(question, str):
        return set()
    texts = [question, _PUBLISHED_JOIN.sub(" ", question), *(question.replace(join, " ") for join in joins if join)]
    return {comparison_key(text) for text in texts}
