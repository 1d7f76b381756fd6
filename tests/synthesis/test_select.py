import torch

from persona_pruner.config.schema import SelectConfig
from persona_pruner.synthesis.select import select_questions
from persona_pruner.synthesis.sources import Question, question_id

TEXTS = ["What is a cat?", "What  is a dog?", "Who are you?", "Where do you live?", "Where do you live now?"]
QUESTIONS = [Question(question_id(text), text, None) for text in TEXTS]
SCORES = torch.tensor([0.1, 0.2, 0.9, 0.8, 0.7])


def chosen(excluded=(), **settings):
    return select_questions(SelectConfig(**settings), QUESTIONS, SCORES, excluded)


def test_top_k_takes_the_best_first():
    assert chosen(k=3) == [2, 3, 4]


def test_threshold_and_quantile_cut_below():
    assert chosen(method="threshold", threshold=0.15) == [2, 3, 4, 1]
    assert chosen(method="quantile", quantile=0.5) == [2, 3]


def test_threshold_and_quantile_have_no_cap():
    assert chosen(method="quantile", quantile=0.5, k=1) == [2, 3]
    assert chosen(method="threshold", threshold=0.15, k=1) == [2, 3, 4, 1]


def test_evaluation_questions_are_never_taken_however_their_space_is_folded():
    assert chosen(k=5, excluded={"What is a dog?", "Who are you?"}) == [3, 4, 0]


def test_diversity_skips_near_duplicates():
    assert chosen(k=5, diversity=0.7) == [2, 3, 1, 0]


def test_ties_break_by_question_id_and_not_by_order():
    scores = torch.zeros(5)
    one = [QUESTIONS[i].id for i in select_questions(SelectConfig(k=3), QUESTIONS, scores)]
    turned = QUESTIONS[::-1]
    assert one == [turned[i].id for i in select_questions(SelectConfig(k=3), turned, scores)]


def test_random_ignores_scores_and_follows_the_seed():
    settings = SelectConfig(method="random", k=2)
    drawn = {tuple(select_questions(settings, QUESTIONS, SCORES, (), f"s{n}")) for n in range(20)}
    assert len(drawn) > 3
    assert select_questions(settings, QUESTIONS, SCORES, (), "s") == select_questions(
        settings, QUESTIONS, -SCORES, (), "s"
    )
