import pytest
from tiny_models import SPECIAL, TEMPLATE, tokenizer

from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.errors import BackboneError

SYSTEM = "You are {persona}."
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
    prefix = persona_prefix(made, SYSTEM, "a {curly} baker")
    suffix = question_suffix(made, SYSTEM, "a {curly} baker", question)
    assert prefix + suffix == rendered(made, "You are a {curly} baker.", question)


def test_the_prefix_ends_before_the_question_and_holds_the_persona():
    made = tokenizer()
    prefix = made.decode(persona_prefix(made, SYSTEM, "a baker"))
    assert "You are a baker." in prefix
    assert prefix.endswith("<head>user</head>")


def test_a_template_without_a_system_role_gets_the_persona_in_the_users_message():
    made = tokenizer()
    made.chat_template = LLAMA_2
    whole = made.decode(persona_prefix(made, SYSTEM, "a baker") + question_suffix(made, SYSTEM, "a baker", "Why?"))
    assert "<head>user</head>You are a baker.\n\nWhy?<eot><head>model</head>" in whole


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
        persona_prefix(made, SYSTEM, "a baker")
