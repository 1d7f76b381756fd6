"""The chat that another model gets."""

from persona_pruner.config.load import check_config
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.rewrite.base import messages
from persona_pruner.synthesis.sources import Question, question_id

ADA = Persona("ada", "Ada, who says {answer} and {question}")
WHY = Question(question_id("Why {persona}?"), "Why {persona}?", "So {question}.")


def chat(prompt, **rewrite):
    return [
        (message["role"], message["content"])
        for message in messages(check_config({"prompt": prompt, "synthesis": {"rewrite": rewrite}}), ADA, WHY)
    ]


def test_every_placeholder_is_filled_in_every_message_and_nothing_inside_a_value_is():
    prompt = {
        "system": "Be {persona}.",
        "rewrite_system": "You rewrite for {persona}.",
        "rewrite": "{persona} is asked: {question}",
        "rewrite_with_reference": "{persona} is asked: {question} Reference: {answer}",
    }
    who = "Ada, who says {answer} and {question}"
    assert chat(prompt) == [
        ("system", f"You rewrite for {who}."),
        ("user", f"{who} is asked: Why {{persona}}?"),
    ]
    assert chat(prompt, with_original=True)[1] == (
        "user",
        f"{who} is asked: Why {{persona}}? Reference: So {{question}}.",
    )


def test_the_system_message_is_that_of_the_backbone_another_one_or_none():
    assert chat({"system": "Be {persona}."})[0] == ("system", "Be Ada, who says {answer} and {question}.")
    assert [role for role, _ in chat({"rewrite_system": ""})] == ["user"]
    assert chat({"rewrite_system": "You are a careful editor."})[0] == ("system", "You are a careful editor.")


def test_braces_that_name_nothing_stay():
    assert (
        chat({"rewrite": 'Reply as {"answer": ...} to {question}'})[1][1]
        == 'Reply as {"answer": ...} to Why {persona}?'
    )
