import pytest

from persona_pruner.evaluation.wording import distinct, repetition, words


def test_distinct_counts_n_grams_of_all_texts_together_and_case_does_not_matter():
    assert distinct(["a b a", "A c"], 1) == 3 / 5
    assert distinct(["a b a b", "a b"], 2) == 2 / 4
    assert distinct(["a"], 2) == distinct([], 1) == 0


def test_repetition_is_the_share_of_n_grams_said_before():
    assert repetition("one two three four five") == 0
    assert repetition("la " * 8) == pytest.approx(4 / 5)
    assert repetition("too short") == repetition("") == 0
    assert repetition("one two three four five", ["Well, one two three four"]) == 1 / 2


def test_words_are_what_blanks_separate():
    assert words("  Aye, my  lamb.\n") == 3
