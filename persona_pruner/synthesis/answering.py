"""From selected questions to a persona's committed data: ask, filter, ask again where too little is usable."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import split_of
from persona_pruner.errors import PersonaError, StorageError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.synthesis import filters
from persona_pruner.synthesis.commit import DataRow, commit, usable_outcomes
from persona_pruner.synthesis.rewrite.base import Answer, Request, Rewriter
from persona_pruner.synthesis.selection import Selection
from persona_pruner.synthesis.sources import Question

FEW_ROWS = 150
"""Below this many usable rows masks overfit (measured on a real chat model: see docs/log.md)."""

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class SynthesisResult:
    persona_id: str
    error: tuple[str, str] | None = None
    """(cause, message) where this persona could not be done."""
    counts: dict[str, int] = field(default_factory=dict)
    """Answers by filter outcome."""
    usable: int = 0
    """Answers that a mask learns from or is judged by."""

    def to_json(self) -> str:
        return json.dumps([self.persona_id, self.error, self.counts, self.usable])

    @classmethod
    def from_json(cls, text: str) -> "SynthesisResult":
        persona_id, error, counts, usable = json.loads(text)
        return cls(persona_id, tuple(error) if error else None, counts, usable)


class AnswerCollector:
    """The answers of one persona so far, and what is asked next.

    Every question is asked `samples_per_question` times. While there are fewer usable answers than questions, or fewer
    answer tokens to train on than `synthesis.answer_tokens`, the questions with the fewest usable answers are asked
    once more, at most `max_samples_per_question` times each. What is asked depends on the persona's own answers only.
    """

    def __init__(self, config: RunConfig, persona: Persona, questions: Sequence[Question], count: CountTokens) -> None:
        self._config, self._persona, self._questions, self._count_tokens = config, persona, questions, count
        self._usable_outcomes = usable_outcomes(config)
        self._asked = [0] * len(questions)
        self._usable = [0] * len(questions)
        self._train_tokens = 0
        self.answers: list[tuple[int, int, Answer, str]] = []
        """(position of the question, sample, answer, filter outcome)"""

    @property
    def usable(self) -> int:
        return sum(self._usable)

    def next_requests(self) -> list[tuple[int, int]]:
        """(position of the question, sample); empty where enough is there, or nothing more may be asked."""
        settings = self._config.synthesis.rewrite
        if not self.answers:
            return [(i, sample) for i in range(len(self._questions)) for sample in range(settings.samples_per_question)]
        missing = self._missing_answers()
        limit = 1 if settings.backend == "none" else settings.max_samples_per_question
        askable = [i for i, asked in enumerate(self._asked) if asked < limit]
        if missing <= 0:
            return []
        expected_rate = max(self.usable / len(self.answers), 0.1)
        askable.sort(key=lambda i: (self._usable[i], self._asked[i], i))
        return [(i, self._asked[i]) for i in askable[: math.ceil(missing / expected_rate)]]

    def add(self, requests: Sequence[tuple[int, int]], answers: Sequence[Answer]) -> None:
        """Answers in the order of `requests`."""
        synthesis = self._config.synthesis
        for (i, sample), answer in zip(requests, answers, strict=True):
            question = self._questions[i]
            # An original answer that is used as it is does not echo itself.
            original = None if synthesis.rewrite.backend == "none" else question.answer
            outcome = filters.outcome(synthesis.filter, question.text, original, answer.text, answer.finished)
            self._asked[i] = max(self._asked[i], sample + 1)
            self.answers.append((i, sample, answer, outcome))
            if outcome in self._usable_outcomes:
                self._usable[i] += 1
                if synthesis.answer_tokens and split_of(question.id, synthesis.heldout_fraction) == "train":
                    self._train_tokens += self._count_tokens(answer.text)

    def _missing_answers(self) -> int:
        missing = len(self._questions) - self.usable
        wanted = self._config.synthesis.answer_tokens
        if wanted and self._train_tokens < wanted:
            per_answer = self._train_tokens / self.usable if self._train_tokens else 1
            missing = max(missing, math.ceil((wanted - self._train_tokens) / per_answer))
        return missing


def answer_and_commit(
    config: RunConfig,
    storage: Storage,
    rewriter: Rewriter,
    question_set: Sequence[Question],
    selections: Sequence[Selection],
    count_tokens: CountTokens,
) -> Iterator[SynthesisResult]:
    """Rewrite and store some personas, their requests together. A persona's own fault is part of its result.

    A PersonaError of the rewriter is that of all personas that it was asked for. Raises EndpointError, RewriteError.
    """
    collectors: dict[int, AnswerCollector] = {}
    for number, selection in enumerate(selections):
        if selection.error is not None:
            yield _failed(selection, selection.error)
        else:
            questions = [question_set[i] for i, _ in selection.chosen]
            collectors[number] = AnswerCollector(config, selection.persona, questions, count_tokens)
    while collectors:
        asked = {number: collector.next_requests() for number, collector in collectors.items()}
        for number in [number for number, requests in asked.items() if not requests]:
            collector = collectors.pop(number)
            yield _commit(config, storage, rewriter.model, question_set, selections[number], collector)
        requests = [
            Request(selections[n].persona, question_set[selections[n].chosen[i][0]], sample)
            for n in collectors
            for i, sample in asked[n]
        ]
        try:
            answers = rewriter.answers(requests) if requests else []
        except PersonaError as error:
            yield from (_failed(selections[number], error) for number in collectors)
            return
        except StorageError as error:
            yield from (_failed(selections[n], PersonaError("storage", str(error))) for n in collectors)
            return
        for number, collector in collectors.items():
            count = len(asked[number])
            collector.add(asked[number], answers[:count])
            answers = answers[count:]


def _commit(
    config: RunConfig,
    storage: Storage,
    model: str,
    question_set: Sequence[Question],
    selection: Selection,
    collector: AnswerCollector,
) -> SynthesisResult:
    persona = selection.persona
    rows = [
        DataRow(question_set[selection.chosen[i][0]], selection.chosen[i][1], outcome, answer.text, sample)
        for i, sample, answer, outcome in sorted(collector.answers, key=lambda each: each[:2])
    ]
    rows += [DataRow(question_set[i], score) for i, score in selection.least]
    try:
        counts: Counter[str] = commit(config, storage, persona, rows, model)
        for item in storage.list(keys.stored_answers(persona.id)):
            storage.delete(item.key)
    except PersonaError as error:
        return _failed(selection, error)
    except StorageError as error:
        return _failed(selection, PersonaError("storage", str(error)))
    if selection.left_out:
        counts["prompt_too_long"] = selection.left_out
    return SynthesisResult(persona.id, None, dict(counts), collector.usable)


def _failed(selection: Selection, error: PersonaError) -> SynthesisResult:
    return SynthesisResult(selection.persona.id, (error.cause, str(error)))
