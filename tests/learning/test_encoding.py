"""Rows as tokens."""

import tiny_models

from persona_pruner.config.schema import PromptConfig
from persona_pruner.dataset import Row
from persona_pruner.learning.encoding import encode_rows


def test_an_unfinished_answer_has_no_end_token(tmp_path):
    tokenizer = tiny_models.tokenizer()
    whole, cut = encode_rows(tokenizer, PromptConfig(), "Ada", [Row("Why?", "So."), Row("Why?", "So.", False)], 200)
    assert whole.tokens[-1] == tokenizer.eos_token_id
    assert cut.tokens == whole.tokens[:-1]
    assert (cut.answer, whole.answer) == (3, 4)


def test_a_conversation_is_read_whole_and_only_its_last_answer_is_learned(tmp_path):
    tokenizer = tiny_models.tokenizer()
    earlier = (("Hello.", "Aye?"), ("Who?", "Me."))
    (row,) = encode_rows(tokenizer, PromptConfig(), "Ada", [Row("Why?", "So.", True, earlier)], 200)
    assert tokenizer.decode(row.tokens[: -row.answer], skip_special_tokens=True) == (
        "Hello.assistantAye?userWho?assistantMe.userWhy?assistant"
    )
    assert tokenizer.decode(row.tokens[-row.answer :], skip_special_tokens=True) == "So."
