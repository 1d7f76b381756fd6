"""The backend `none`: original answers as they are (the paper's ablation without rewriting)."""

from collections.abc import Sequence

from persona_pruner.synthesis.rewrite.base import Answer, Request


class OriginalAnswers:
    """A Rewriter that rewrites nothing. A question without an original answer gets an empty one."""

    model = "original"

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        return [Answer((request.question.answer or "").strip(), True) for request in requests]
