"""From scores to the questions that one persona is asked, in a form that travels between actors."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.evaluation_questions import read_evaluation_questions
from persona_pruner.synthesis.select import select_questions
from persona_pruner.synthesis.sources import Question

LEAST_KEPT = 5
"""Questions that a persona's data keep although nobody was asked: those that reveal it least."""


class Scorer(Protocol):
    """See `Sensitivity`."""

    def tile(self, personas: Sequence[Persona]) -> Sequence[tuple[Persona, Tensor | PersonaError]]:
        """(persona, scores float32 [Q], or what is wrong with this persona) in order."""


@dataclass(frozen=True)
class Selection:
    """A persona between scoring and rewriting."""

    persona: Persona
    chosen: tuple[tuple[int, float], ...] = ()
    """(position in the question set, score) of what was selected, best first."""
    least: tuple[tuple[int, float], ...] = ()
    """The same of the least sensitive questions, which nobody is asked."""
    left_out: int = 0
    """Questions without a score: their prompts are too long."""
    error: PersonaError | None = None

    def to_json(self) -> str:
        error = self.error and (self.error.cause, str(self.error))
        return json.dumps([self.persona.id, self.persona.description, self.chosen, self.least, self.left_out, error])

    @classmethod
    def from_json(cls, text: str) -> "Selection":
        name, description, chosen, least, left_out, error = json.loads(text)
        fault = PersonaError(*error) if error else None
        return cls(Persona(name, description), _pairs(chosen), _pairs(least), left_out, fault)


def score_and_select(
    config: RunConfig, scorer: Scorer, question_set: Sequence[Question], personas: Sequence[Persona]
) -> Iterator[Selection]:
    """One Selection for each persona of a tile; what is wrong with a persona is in its `error`."""
    for persona, scores in scorer.tile(personas):
        try:
            if isinstance(scores, PersonaError):
                raise scores
            yield select(config, persona, question_set, scores)
        except PersonaError as error:
            yield Selection(persona, error=error)


def select(config: RunConfig, persona: Persona, question_set: Sequence[Question], scores_Q: Tensor) -> Selection:
    """The persona's questions, without those of its evaluation. Raises PersonaError."""
    settings = config.synthesis
    excluded = read_evaluation_questions(config, persona.id)
    chosen = select_questions(settings.select, question_set, scores_Q, excluded, f"{settings.seed}\0{persona.id}")
    taken = set(chosen)
    rest = [i for i in scores_Q.argsort(stable=True).tolist() if i not in taken and not scores_Q[i].isnan()]
    scored, least = (_pairs((i, float(scores_Q[i])) for i in each) for each in (chosen, rest[:LEAST_KEPT]))
    return Selection(persona, scored, least, int(scores_Q.isnan().sum()))


def _pairs(pairs: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((position, score) for position, score in pairs)
