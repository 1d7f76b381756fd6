"""What makes an answer unusable. `outcome` names the first reason, or says "ok"."""

import re
from difflib import SequenceMatcher

from persona_pruner.config.schema import FilterConfig
from persona_pruner.dataset import CUT_OFF, USABLE

_REFUSAL = re.compile(
    r"\b(i('m| am) sorry,? but|i (can('t|not)|am unable to|won't) (help|assist|answer|do that|comply|fulfil+|provide)|"
    r"i must decline)\b",
    re.IGNORECASE,
)
_ASSISTANT = re.compile(r"\bas an? (ai|artificial intelligence|(large )?language model)\b", re.IGNORECASE)
_LEAK = re.compile(
    r"(you are roleplaying|roleplay as|reply with the answer alone|reference answer:|in the voice of the persona)",
    re.IGNORECASE,
)


def outcome(config: FilterConfig, question: str, original: str | None, answer: str, finished: bool) -> str:
    """ok, empty, assistant, refusal, leak or echo; cut_off where that is its only fault."""
    words = answer.lower().split()
    if len(words) < config.min_words:
        return "empty"
    if _ASSISTANT.search(answer):
        return "assistant"
    if _REFUSAL.search(answer):
        return "refusal"
    if _LEAK.search(answer):
        return "leak"
    for other in (original, question):
        if other and _overlap(words, other.lower().split()) >= config.echo_overlap:
            return "echo"
    return USABLE if finished else CUT_OFF


def _overlap(words: list[str], other: list[str]) -> float:
    """Share of `words` that stand in `other` in the same order."""
    blocks = SequenceMatcher(None, words, other, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(words)
