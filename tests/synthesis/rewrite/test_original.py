from persona_pruner.manifest import Persona
from persona_pruner.synthesis.rewrite.base import Answer, Request
from persona_pruner.synthesis.rewrite.original import OriginalAnswers
from persona_pruner.synthesis.sources import Question


def test_answers_are_the_sources_own():
    ada = Persona("ada", "Ada")
    requests = [Request(ada, Question("1", "Why?", " So. "), 0), Request(ada, Question("2", "Who?", None), 0)]
    assert OriginalAnswers().answers(requests) == [Answer("So.", True), Answer("", True)]
