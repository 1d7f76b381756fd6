"""Prompts as token ids, rendered by the tokenizer's own chat template.

A prompt is split once, at the last special token before the question: what stands before depends on the persona
alone and is run once for all its questions.
"""

from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from persona_pruner.errors import BackboneError

_PROBES = ("Why?", "1 + 1", "\nwhere", " so")


def persona_prefix(tokenizer: Any, system: str, description: str) -> list[int]:
    """Token ids shared by all questions of a persona. Raises BackboneError for a tokenizer without a chat template."""
    return list(_prefix(tokenizer, system, description))


def question_suffix(tokenizer: Any, system: str, description: str, question: str) -> list[int]:
    """Token ids after the prefix, up to where the answer starts (never empty).

    prefix + suffix equals the ids of the whole rendered prompt; BackboneError where the tokenizer does not allow it.
    """
    prefix = _prefix(tokenizer, system, description)
    whole = _encode(tokenizer, _render(tokenizer, system, description, question))
    if tuple(whole[: len(prefix)]) != prefix or len(whole) == len(prefix):
        raise BackboneError(f"the chat template does not put the question {question[:40]!r} after the persona")
    return whole[len(prefix) :]


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer with the end-of-turn token, as the template closes an assistant's message."""
    end = _end_of_turn(tokenizer)
    return [*_encode(tokenizer, answer.strip()), *end]


@lru_cache(maxsize=256)
def _prefix(tokenizer: Any, system: str, description: str) -> tuple[int, ...]:
    prompts = [_encode(tokenizer, _render(tokenizer, system, description, probe)) for probe in _PROBES]
    shared = 0
    while all(shared < len(p) and p[shared] == prompts[0][shared] for p in prompts):
        shared += 1
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    cuts = [i + 1 for i in range(shared) if prompts[0][i] in special]
    cut = max(cuts, default=shared)
    return tuple(prompts[0][: min(cut, min(map(len, prompts)) - 1)])


def _render(tokenizer: Any, system: str, description: str, question: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise BackboneError("the backbone has no chat template; use a chat model, or add chat_template.jinja to it")
    text = system.replace("{persona}", description)
    messages = [{"role": "system", "content": text}, {"role": "user", "content": question}]
    try:
        return _template(tokenizer, messages)
    except TemplateError:
        return _template(tokenizer, [{"role": "user", "content": f"{text}\n\n{question}"}])


def _template(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = True) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """The first token that the template puts after an answer; the tokenizer's eos where it puts none."""
    user = {"role": "user", "content": "Why?"}
    asked = _template(tokenizer, [user])
    told = _template(tokenizer, [user, {"role": "assistant", "content": "Because."}], prompt=False)
    if told.startswith(asked):
        after = told[len(asked) :].partition("Because.")[2]
        ids = _encode(tokenizer, after)
        if ids and tokenizer.decode(ids[:1]).strip() in after:
            return tuple(ids[:1])
    if tokenizer.eos_token_id is None:
        raise BackboneError("the backbone's tokenizer has neither an end-of-turn token nor an eos token")
    return (int(tokenizer.eos_token_id),)
