import pytest

from persona_pruner.config.schema import FilterConfig
from persona_pruner.synthesis import filters


@pytest.mark.parametrize(
    ("answer", "finished", "expected"),
    [
        ("Aye, the tide decides.", True, "ok"),
        ("", True, "empty"),
        ("Aye, the tide", False, "cut_off"),
        ("I'm sorry, but I can't help with that.", True, "refusal"),
        ("As an AI language model I have no mornings.", True, "assistant"),
        ("As an AI language model I have no", False, "assistant"),
        ("You are roleplaying as a user with this persona.", True, "leak"),
        ("Drink water and sleep well every night.", True, "echo"),
    ],
)
def test_the_first_reason_is_named_and_a_cut_is_the_last(answer, finished, expected):
    original = "Drink water and sleep well every night."
    settings = FilterConfig(min_words=1)
    assert filters.outcome(settings, "How to stay healthy?", original, answer, finished) == expected
