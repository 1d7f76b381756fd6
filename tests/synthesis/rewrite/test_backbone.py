"""The backbone answers in its own distribution under the persona's prompt."""

import re

import pytest
import tiny_models
import torch

from persona_pruner.backbone.prompts import persona_prefix, question_suffix
from persona_pruner.config.load import check_config
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.rewrite.backbone import SelfRewriter
from persona_pruner.synthesis.rewrite.base import Request
from persona_pruner.synthesis.sources import Question, question_id

TEXTS = [f"Question {'long ' * (n % 5)}{n}?" for n in range(12)]
QUESTIONS = [Question(question_id(text), text, "Plain answer.") for text in TEXTS]
ADA = Persona("ada", "Ada, a pilot")


def config(**rewrite):
    return check_config({"synthesis": {"rewrite": {"max_new_tokens": 12, "batch_size": 5, **rewrite}}})


def requests(persona=ADA, samples=1, questions=QUESTIONS):
    return [Request(persona, question, sample) for question in questions for sample in range(samples)]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_answers_are_the_models_own_greedy_continuation_at_temperature_0(tmp_path, family):
    backbone, settings = tiny_models.tiny(tmp_path, family), config(temperature=0)
    answers = SelfRewriter(backbone, settings).answers(requests())
    end = backbone.tokenizer.eos_token_id
    for question, answer in zip(QUESTIONS, answers, strict=True):
        ids = persona_prefix(backbone.tokenizer, settings.prompt, ADA.description)
        ids = ids + question_suffix(backbone.tokenizer, settings.prompt, ADA.description, question.text)
        out = []
        while len(out) < 12 and end not in out:
            with torch.no_grad():
                out.append(backbone.model(torch.tensor([ids + out])).logits[0, -1].argmax().item())
        assert answer.finished is (out[-1] == end)
        expected = backbone.tokenizer.decode([token for token in out if token != end], skip_special_tokens=True)
        assert answer.text == (expected if answer.finished else re.sub(r"[\ufffd\s]+$", "", expected)).strip()


def test_an_answer_depends_on_its_question_sample_and_persona_only(tmp_path):
    rewriter = SelfRewriter(tiny_models.tiny(tmp_path), config())
    asked = requests(samples=2)
    answers = rewriter.answers(asked)
    assert rewriter.answers(asked) == answers
    assert rewriter.answers(asked[:6]) == answers[:6]
    assert any(first != second for first, second in zip(answers[::2], answers[1::2], strict=True))
    other = requests(Persona("bo", ADA.description), samples=2)
    together = rewriter.answers([*other, *asked])
    assert together[24:] == answers
    assert together[:24] != answers


def test_a_cut_character_is_no_part_of_an_answer(tmp_path):
    answers = SelfRewriter(tiny_models.tiny(tmp_path), config()).answers(requests(samples=4))
    assert any(not answer.finished for answer in answers)
    assert not any(answer.text.endswith("\ufffd") for answer in answers if not answer.finished)
