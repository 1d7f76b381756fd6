import datetime
import itertools

import pytest
from tiny_models import SPECIAL, TEMPLATE, tokenizer
from transformers.utils import chat_template_utils

from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix, render_chat
from persona_pruner.config.schema import PromptConfig
from persona_pruner.errors import BackboneError

PROMPT = PromptConfig(system="You are {persona}.")
QUESTIONS = ["Why?", "  1 + 1 is what", "\nWhere?\n", "ünïcödé", "?"]
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<bos>{% for m in messages %}<head>{{ m['role'] }}</head>{{ m['content'] }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<head>model</head>{% endif %}"
)


def rendered(made, system, question):
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return made(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("question", QUESTIONS)
def test_prefix_and_suffix_are_the_whole_prompt(question):
    made = tokenizer()
    prefix = persona_prefix(made, PROMPT, "a {curly} baker")
    suffix = question_suffix(made, PROMPT, "a {curly} baker", question)
    assert prefix + suffix == rendered(made, "You are a {curly} baker.", question)


def test_the_prefix_ends_before_the_question_and_holds_the_persona():
    made = tokenizer()
    prefix = made.decode(persona_prefix(made, PROMPT, "a baker"))
    assert "You are a baker." in prefix
    assert prefix.endswith("<head>user</head>")


def test_a_template_without_a_system_role_gets_the_persona_in_the_users_message():
    made = tokenizer()
    made.chat_template = LLAMA_2
    whole = made.decode(persona_prefix(made, PROMPT, "a baker") + question_suffix(made, PROMPT, "a baker", "Why?"))
    assert "<head>user</head>You are a baker.\n\nWhy?<eot><head>model</head>" in whole


@pytest.mark.parametrize("template", [TEMPLATE, LLAMA_2])
def test_what_was_said_before_stands_between_persona_and_question(template):
    made = tokenizer()
    made.chat_template = template
    prefix = persona_prefix(made, PROMPT, "a baker")
    suffix = question_suffix(made, PROMPT, "a baker", "Why?", [("Hello.", "Good day!"), ("Bread?", "Yes.")])
    said = made.decode(prefix + suffix, skip_special_tokens=True)
    assert "You are a baker." in said.partition("Hello.")[0]
    asked = said.partition("Hello.")[2].replace("model", "assistant")
    assert asked == "assistantGood day!userBread?assistantYes.userWhy?assistant"


def test_answers_end_with_the_templates_end_of_turn():
    made = tokenizer()
    assert made.decode(answer_tokens(made, " Because. ")) == "Because.<eot>"
    made = tokenizer()
    made.chat_template = TEMPLATE.replace("<eot>", "</head>")
    assert answer_tokens(made, "x")[-1] == SPECIAL.index("</head>")


def test_a_tokenizer_without_a_chat_template_is_refused():
    made = tokenizer()
    made.chat_template = None
    with pytest.raises(BackboneError, match="no chat template"):
        persona_prefix(made, PROMPT, "a baker")


LLAMA_3_2 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
    "{%- endif %}{%- endif %}<bos><head>system</head>Today Date: {{ date_string }}\n"
    "{% for m in messages %}<head>{{ m['role'] }}</head>{{ m['content'] | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<head>assistant</head>{% endif %}"
)
"""How Llama 3.2's template finds its date."""
EVERY_FORMAT = "<bos>{{ strftime_now('%A %B %-d, %y %j 100%%') }}<head>user</head>{{ messages[-1]['content'] }}<eot>"
CLOCK_READING = LLAMA_3_2.replace("not date_string is defined", "true")


@pytest.mark.parametrize("template", [LLAMA_3_2, CLOCK_READING])
def test_prompts_are_the_same_under_every_clock_and_across_midnight(monkeypatch, template):
    days = itertools.count(1)

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, next(days))

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    made = []
    for _ in range(2):
        made.append(tokenizer())
        made[-1].chat_template = template
    assert rendered(made[0], "s", "q") != rendered(made[0], "s", "q"), "the template reads this clock"
    prompts = [persona_prefix(one, PROMPT, "a baker") + question_suffix(one, PROMPT, "a baker", "Why?") for one in made]
    assert prompts[0] == prompts[1]
    assert "Today Date: 26 Jul 2024" in made[0].decode(prompts[0])
    other = PromptConfig(system="You are {persona}.", date="2025-01-31")
    assert "Today Date: 31 Jan 2025" in made[0].decode(persona_prefix(made[0], other, "a baker"))
    assert made[0].decode(answer_tokens(made[0], "Because.")) == "Because.<eot>"


def test_a_template_may_ask_for_the_date_in_any_format():
    made = tokenizer()
    made.chat_template = EVERY_FORMAT
    assert render_chat(made, [{"role": "user", "content": "hi"}], datetime.date(2025, 1, 3)).startswith(
        "<bos>Friday January 3, 25 003 100%<head>"
    )
