"""The questions by which a persona will be evaluated: they never enter its data."""

import re
from collections.abc import Collection
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.evaluation.questions import read_questions_file
from persona_pruner.synthesis.sources import comparison_key

_PUBLISHED_JOIN = re.compile(r"\s*\n\s*#{0,4}\s*Input:\s*", re.IGNORECASE)
"""What stands between instruction and input in prompts of the Alpaca form."""


def read_evaluation_questions(config: RunConfig, persona_id: str) -> set[str]:
    """Comparison keys of the persona's file under `evaluation.questions`. Raises PersonaError."""
    joins = {source.join for source in config.synthesis.sources}
    return {key for question in read_questions_file(config, persona_id) for key in _keys(question, joins)}


def _keys(question: Any, joins: Collection[str]) -> set[str]:
    """A text does not say where its input begins: its keys under every join that may have made it."""
    if isinstance(question, dict):
        return {comparison_key(str(question.get("instruction", "")), str(question.get("input") or ""))}
    if not isinstance(question, str):
        return set()
    texts = [question, _PUBLISHED_JOIN.sub(" ", question), *(question.replace(join, " ") for join in joins if join)]
    return {comparison_key(text) for text in texts}
