import pyarrow.parquet as pq
import pytest
import tiny_models

from persona_pruner.config.load import check_config
from persona_pruner.dataset import SCHEMA, read_persona_data, split_of
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis import filters
from persona_pruner.synthesis.commit import Answer, commit
from persona_pruner.synthesis.rewrite import SelfRewriter
from persona_pruner.synthesis.sources import Question, question_id

TEXTS = [f"Question {'long ' * (n % 5)}{n}?" for n in range(12)]
QUESTIONS = [Question(question_id(text), text, "Plain answer.") for text in TEXTS]
ADA = Persona("ada", "Ada, a pilot")


def config(**rewrite):
    return check_config(
        {
            "backbone": {"path": "x"},
            "synthesis": {
                "rewrite": {"max_new_tokens": 12, "batch_size": 5, **rewrite},
                "filter": {"min_answers": 2, "min_words": 1},
            },
        }
    )


def test_samples_are_the_models_own_greedy_continuation_at_temperature_0(tmp_path):
    import torch

    from persona_pruner.backbone.prompts import persona_prefix, question_suffix

    backbone = tiny_models.tiny(tmp_path)
    settings = config(temperature=0)
    answers = SelfRewriter(backbone, settings).answers(ADA, QUESTIONS)
    end = backbone.tokenizer.eos_token_id
    for question, (answer,) in zip(QUESTIONS, answers, strict=True):
        prompt = settings.prompt
        ids = persona_prefix(backbone.tokenizer, prompt, ADA.description)
        ids = ids + question_suffix(backbone.tokenizer, prompt, ADA.description, question.text)
        out = []
        for _ in range(12):
            with torch.no_grad():
                out.append(backbone.model(torch.tensor([ids + out])).logits[0, -1].argmax().item())
            if out[-1] == end:
                break
        finished = out[-1] == end
        out = out[:-1] if finished else out
        assert answer.finished is finished
        assert answer.text == backbone.tokenizer.decode(out, skip_special_tokens=True).strip()


def test_an_answer_depends_on_its_question_and_persona_only(tmp_path):
    backbone = tiny_models.tiny(tmp_path)
    rewriter = SelfRewriter(backbone, config(samples_per_question=2))
    whole = rewriter.answers(ADA, QUESTIONS)
    assert rewriter.answers(ADA, QUESTIONS) == whole
    assert rewriter.answers(ADA, QUESTIONS[:3]) == whole[:3]
    assert rewriter.answers(Persona("bo", ADA.description), QUESTIONS) != whole
    assert any(first != second for first, second in whole)


def test_committed_rows_come_back_as_training_data(tmp_path):
    settings, storage = config(), open_storage(tmp_path)
    answers = [[Answer(f"I say {n} by the tide.", True)] for n in range(11)] + [[Answer("", True)]]
    counts = commit(settings, storage, ADA, QUESTIONS, [0.5] * 12, answers, "m")
    assert counts == {"empty": 1, "ok": 11}
    first = storage.get(keys.persona_data("ada"))
    commit(settings, storage, ADA, QUESTIONS, [0.5] * 12, answers, "m")
    assert storage.get(keys.persona_data("ada")) == first
    data = read_persona_data(storage, ADA)
    assert len(data.train) + len(data.heldout) == 11
    table = pq.read_table(tmp_path / keys.persona_data("ada"))
    assert table.column_names == SCHEMA.names
    split = dict(zip(table["question_id"].to_pylist(), table["split"].to_pylist(), strict=True))
    assert split == {q.id: split_of(q.id, 0.25) for q in QUESTIONS}


def test_too_few_answers_are_the_personas_error_with_counts(tmp_path):
    answers = [[Answer("As an AI I do not roleplay.", True)] for _ in QUESTIONS]
    with pytest.raises(PersonaError, match=r"0 usable answers.*assistant 12") as caught:
        commit(config(), open_storage(tmp_path), ADA, QUESTIONS, [0.5] * 12, answers, "m")
    assert caught.value.cause == "few_answers"
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("answer", "finished", "expected"),
    [
        ("Aye, the tide decides.", True, "ok"),
        ("", True, "empty"),
        ("Aye, the tide", False, "cut_off"),
        ("As an AI language model I have no", False, "assistant"),
        ("I'm sorry, but I can't help with that.", True, "refusal"),
        ("As an AI language model I have no mornings.", True, "assistant"),
        ("You are roleplaying as a user with this persona.", True, "leak"),
        ("Drink water and sleep well every night.", True, "echo"),
    ],
)
def test_filters_name_the_reason(answer, finished, expected):
    settings = config().synthesis.filter
    original = "Drink water and sleep well every night."
    assert filters.outcome(settings, "How to stay healthy?", original, answer, finished) == expected
