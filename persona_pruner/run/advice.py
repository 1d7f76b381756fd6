"""What to do next: commands that run as they stand, and settings to change where personas failed."""

import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import CUT_OFF, NOT_SELECTED
from persona_pruner.storage import keys
from persona_pruner.synthesis.commit import usable_outcomes

_COUNT = re.compile(r"(\w+) (\d+)")


def command() -> str:
    """How this environment's `persona-pruner` is called from the working directory."""
    script = Path(sys.executable).parent / "persona-pruner"
    here = Path.cwd()
    if not script.exists() or sys.prefix == sys.base_prefix:
        return "persona-pruner"
    return str(script.relative_to(here)) if script.is_relative_to(here) else "persona-pruner"


def next_steps(config: RunConfig, url: str, masked: Sequence[str]) -> list[str]:
    """Commands about a run, the ones about a persona for the first that has a mask."""
    output, program = shlex.quote(url), command()
    steps = [f"{program} status {output}"]
    if masked:
        first = masked[0]
        mask = shlex.quote(f"{url}/{keys.mask(first)}")
        steps += [
            f"{program} inspect {output} --persona {first}",
            f"{program} export {mask} --backbone {shlex.quote(config.backbone.path)} --to exported/{first}",
        ]
    return steps


def advice(config: RunConfig, errors: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each cause that a setting can mend, from errors/<id>.json objects (cause, message)."""
    by_cause: dict[str, list[str]] = {}
    for error in errors:
        by_cause.setdefault(str(error.get("cause")), []).append(str(error.get("message", "")))
    lines = []
    for cause, messages in by_cause.items():
        line = _few_answers(config, messages) if cause == "few_answers" else _SETTINGS.get(cause)
        if line is not None:
            plural = "persona" if len(messages) == 1 else "personas"
            lines.append(f"{len(messages)} {plural}: {line}")
    return lines


_SETTINGS = {
    "row_too_long": "raise learning.max_row_tokens, or ask for shorter answers (synthesis.rewrite.max_new_tokens)",
    "prompt_too_long": "shorten the description, or raise synthesis.max_prompt_tokens",
    "rewrite_deadline": "raise synthesis.rewrite.deadline_seconds, or lower synthesis.rewrite.concurrency",
    "token_budget": "raise synthesis.rewrite.token_budget; answers already paid for are kept",
    "no_data": "run jobs/synthesize.py or the main job first",
    "no_warm_scores": "set learning.keep_scores to true in the run that gives the scores, or change learning.init",
    "not_finite": "set backbone.dtype to float32, or take a lower learning.learning_rate",
}
"""What mends a cause of errors/<id>.json."""


def _few_answers(config: RunConfig, messages: Sequence[str]) -> str:
    """By what most answers were dropped for. A message ends with the counts: `... (cut_off 14, ok 2)`."""
    outcomes: Counter[str] = Counter()
    for message in messages:
        outcomes.update({name: int(count) for name, count in _COUNT.findall(message[message.rfind("(") :])})
    kept = {*usable_outcomes(config), NOT_SELECTED}
    dropped = Counter({name: count for name, count in outcomes.items() if name not in kept})
    total = sum(outcomes.values()) - outcomes[NOT_SELECTED]
    if not dropped:
        return (
            f"only {total} answers: raise synthesis.select.k or synthesis.rewrite.samples_per_question, "
            "or lower synthesis.filter.min_answers"
        )
    worst, count = dropped.most_common(1)[0]
    if worst == CUT_OFF:
        limit = config.synthesis.rewrite.max_new_tokens
        return f"{count} of {total} answers were cut off at {limit} tokens: raise synthesis.rewrite.max_new_tokens"
    return f"{count} of {total} answers were dropped ({worst}): {_OUTCOMES[worst]}"


_OUTCOMES = {
    "empty": "lower synthesis.filter.min_words, or ask for longer answers in the prompt",
    "echo": "raise synthesis.filter.echo_overlap, or set synthesis.rewrite.with_original to false",
    "refusal": "change the prompt's wording, or take another rewriting model",
    "assistant": "change the prompt's wording so that the model stays in the role, or take another rewriting model",
    "leak": "change the prompt's wording so that answers do not repeat the instruction",
}
"""What mends an outcome of synthesis/filters.py."""
