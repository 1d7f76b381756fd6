"""The questions by which a persona is evaluated: those of its file, else those that its data hold out."""

import json
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.errors import PersonaError, StorageError
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import read_url


def read_questions_file(config: RunConfig, persona_id: str) -> list[Any]:
    """The persona's file below `evaluation.questions`; empty where there is none. Raises PersonaError.

    <id>.json holds a list of questions, or an object with such a list under `questions`; a question is a text, or an
    object with instruction and input. <id>.txt holds one question per line.
    """
    directory = config.evaluation.questions
    if directory is None:
        return []
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
        return list(questions)
    return []


def evaluation_questions(config: RunConfig, persona_id: str, data: PersonaData | None) -> tuple[str, ...]:
    """Up to `evaluation.answers.questions` different texts, the first ones. Raises PersonaError (no_questions)."""
    texts = [_text(question).strip() for question in read_questions_file(config, persona_id)]
    if not texts and data is not None:
        texts = [row.question for row in data.heldout]
    questions = tuple(text for text in dict.fromkeys(texts) if text)[: config.evaluation.answers.questions]
    if not questions:
        raise PersonaError(
            "no_questions", "no held-out question in its data, and no file of it in evaluation.questions"
        )
    return questions


def _text(question: Any) -> str:
    if isinstance(question, dict):
        parts = [str(question.get("instruction", "")), str(question.get("input") or "")]
        return "\n".join(part for part in parts if part)
    return question if isinstance(question, str) else ""
