"""Prompts as token ids, rendered by the tokenizer's own chat template.

A prompt is split once, at the last special token before the question: everything before that depends on the persona
alone and is run once for all its questions.
"""

import datetime
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from persona_pruner.config.schema import DEFAULT_DATE, PromptConfig
from persona_pruner.errors import BackboneError

_PROBES = ("Why?", "1 + 1", "\nwhere", " so")


def persona_prefix(tokenizer: Any, prompt: PromptConfig, description: str) -> list[int]:
    """Token ids shared by all questions of a persona. Raises BackboneError for a tokenizer without a chat template."""
    return list(_prefix(tokenizer, prompt, description))


def question_suffix(
    tokenizer: Any, prompt: PromptConfig, description: str, question: str, earlier: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """Token ids after the prefix, up to where the answer starts (never empty). `earlier`: questions and answers of the
    same conversation, the oldest first.

    prefix + suffix equals the ids of the whole rendered prompt; BackboneError where the tokenizer does not allow it.
    """
    prefix = _prefix(tokenizer, prompt, description)
    token_ids = _encode(tokenizer, _render(tokenizer, prompt, description, question, earlier))
    if tuple(token_ids[: len(prefix)]) != prefix or len(token_ids) == len(prefix):
        raise BackboneError(f"the chat template does not put the question {question[:40]!r} after the persona")
    return token_ids[len(prefix) :]


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """Token ids of an answer with the end-of-turn token, as the template closes an assistant's message."""
    end = _end_of_turn(tokenizer)
    return [*_encode(tokenizer, answer.strip()), *end]


def render_chat(
    tokenizer: Any, messages: list[dict[str, str]], date: datetime.date, add_generation_prompt: bool = True
) -> str:
    """The text of a chat, with `date` as what the template sees as today.

    Templates like Llama 3.2's read the clock, and a run that is resumed on another day would get other prompts. The
    clock can only be replaced by a macro: transformers (5.23) passes no functions to a template.
    """
    return str(
        tokenizer.apply_chat_template(
            messages,
            chat_template=dated_template(tokenizer, date),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    )


def dated_template(tokenizer: Any, date: datetime.date) -> str:
    """The tokenizer's chat template, which sees `date` as today wherever it asks for it."""
    template = str(tokenizer.get_chat_template())
    if "date_string" in template:
        template = f"{{%- set date_string = {date.strftime('%d %b %Y')!r} -%}}\n{template}"
    if "strftime_now" in template:
        template = f"{_date_macro(date)}\n{template}"
    return template


@lru_cache(maxsize=16)
def _date_macro(date: datetime.date) -> str:
    at_noon = datetime.datetime.combine(date, datetime.time(12))
    directives = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdfGHIjmMpSuUVwWxXyYzZ"]
    filters = "".join(f" | replace({d!r}, {at_noon.strftime(d)!r})" for d in directives)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} | replace('%%', '%') }}}}{{%- endmacro %}}"


@lru_cache(maxsize=256)
def _prefix(tokenizer: Any, prompt: PromptConfig, description: str) -> tuple[int, ...]:
    prompts = [_encode(tokenizer, _render(tokenizer, prompt, description, probe)) for probe in _PROBES]
    shared = 0
    while all(shared < len(p) and p[shared] == prompts[0][shared] for p in prompts):
        shared += 1
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", ()))
    cuts = [i + 1 for i in range(shared) if prompts[0][i] in special]
    cut = max(cuts, default=shared)
    return tuple(prompts[0][: min(cut, min(map(len, prompts)) - 1)])


def _render(
    tokenizer: Any, prompt: PromptConfig, description: str, question: str, earlier: Sequence[tuple[str, str]] = ()
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise BackboneError("the backbone has no chat template; use a chat model, or add chat_template.jinja to it")
    system = prompt.system.replace("{persona}", description)
    said = [text for turn in earlier for text in turn] + [question]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    try:
        return render_chat(tokenizer, [{"role": "system", "content": system}, *messages], prompt.date)
    except TemplateError:
        messages[0]["content"] = f"{system}\n\n{said[0]}"
        return render_chat(tokenizer, messages, prompt.date)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """The first token that the template puts after an answer; the tokenizer's eos where it puts none."""
    user = {"role": "user", "content": "Why?"}
    answer = {"role": "assistant", "content": "Because."}
    asked = render_chat(tokenizer, [user], DEFAULT_DATE)
    answered = render_chat(tokenizer, [user, answer], DEFAULT_DATE, add_generation_prompt=False)
    if answered.startswith(asked):
        after = answered[len(asked) :].partition("Because.")[2]
        ids = _encode(tokenizer, after)
        if ids and tokenizer.decode(ids[:1]).strip() in after:
            return tuple(ids[:1])
    if tokenizer.eos_token_id is None:
        raise BackboneError("the backbone's tokenizer has neither an end-of-turn token nor an eos token")
    return (int(tokenizer.eos_token_id),)


def knows_system_role(tokenizer: Any) -> bool:
    """Whether the chat template says what a system message holds."""
    messages = [{"role": "system", "content": "Persona"}, {"role": "user", "content": "Why?"}]
    try:
        return "Persona" in tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return False
