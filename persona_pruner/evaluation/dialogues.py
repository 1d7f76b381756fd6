"""Conversations of a simulated user with a persona under every arm: does the character hold over the turns?"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from persona_pruner.backbone.prompts import persona_prefix, question_suffix
from persona_pruner.dataset import Row
from persona_pruner.evaluation.answers import Question, ask, measure
from persona_pruner.evaluation.judge import Verdict, stored_verdicts, verdict_means
from persona_pruner.evaluation.likelihood import read_rows
from persona_pruner.evaluation.questions import evaluation_questions
from persona_pruner.evaluation.simulated_user import SimulatedUser, Turns
from persona_pruner.evaluation.statistics import RunningMeans, mean
from persona_pruner.evaluation.subject import ARMS, Subject
from persona_pruner.evaluation.summary import read_answers
from persona_pruner.evaluation.wording import repetition
from persona_pruner.storage.base import Storage

MEASURES = ("first", "rank", "own_loss", "repetition", "ended", "judge_consistency", "judge_coherence")
COLUMNS = ("turn", "arm", "personas", *MEASURES)
ByTurn = Mapping[tuple[int, str], Mapping[str, float | None]]
"""Means of MEASURES of one persona by turn and arm."""


@dataclass
class _Dialogue:
    arm: int
    number: int
    says: str
    """What the user says next."""
    turns: Turns = ()


def converse(subject: Subject) -> list[dict[str, Any]]:
    """Rows of `evaluation.dialogues` under every arm, turn by turn. Raises PersonaError.

    `rank` and `similarity` are of the reply to the user's last words alone, so that what was said before does not give
    the persona away; `own_loss` is that of the reply in its conversation; `repetition` counts what the persona has said
    in the whole of it. Conversations forget their oldest turns where they get longer than learning.max_row_tokens.
    """
    settings = subject.config.evaluation.dialogues
    openings = evaluation_questions(subject.config, subject.persona.id, subject.data)[: settings.count]
    dialogues = [_Dialogue(arm, n, text) for arm in range(len(subject.arms)) for n, text in enumerate(openings)]
    user, rows = SimulatedUser(subject), []
    for turn in range(1, settings.turns + 1):
        if turn > 1:
            said = user.say([(one.number, one.turns) for one in dialogues])
            for one, text in zip(dialogues, said, strict=True):
                one.says = text
        rows += _turn(subject, dialogues, turn)
    return rows


def _turn(subject: Subject, dialogues: list[_Dialogue], turn: int) -> list[dict[str, Any]]:
    """Ask, measure, and add what was said to the dialogues."""
    questions = [Question(one.arm, one.number, one.says, _remembered(subject, one)) for one in dialogues]
    rows = ask(subject, questions, f"dialogues {turn}")
    measure(subject, rows)
    texts = [
        Row(row["question"], row["text"], bool(row["ended"]) or not row["text"], question.earlier)
        for row, question in zip(rows, questions, strict=True)
    ]
    reading = read_rows(subject.backbone, subject.config, subject.persona.description, texts)
    for one, row, loss in zip(dialogues, rows, reading.losses_R.tolist(), strict=True):
        said = [answer for _, answer in one.turns]
        row |= {"turn": turn, "own_loss": loss, "repetition": repetition(row["text"], said)}
        one.turns = (*one.turns, (one.says, row["text"]))
    return rows


def _remembered(subject: Subject, one: _Dialogue) -> Turns:
    config, tokenizer, description = subject.config, subject.backbone.tokenizer, subject.persona.description
    room = subject.room - len(persona_prefix(tokenizer, config.prompt, description))
    turns = one.turns
    while turns and len(question_suffix(tokenizer, config.prompt, description, one.says, turns)) > room:
        turns = turns[1:]
    return turns


def stored(
    storage: Storage, connections: int = 16, persona_ids: Sequence[str] | None = None
) -> Iterator[tuple[str, ByTurn]]:
    """`by_turn` of every persona that was talked with."""
    for rows in read_answers(storage, connections, persona_ids, "dialogues"):
        persona_id = rows["persona_id"][0].as_py()
        yield persona_id, by_turn(rows, stored_verdicts(storage, persona_id))


def by_turn(rows: pa.Table, verdicts: Sequence[Verdict]) -> ByTurn:
    means: dict[tuple[int, str], dict[str, float | None]] = {}
    for turn in sorted(set(rows["turn"].to_pylist())):
        of_turn = rows.filter(pc.equal(rows["turn"], turn))
        judged = verdict_means(verdicts, of_turn)
        for arm in ARMS:
            own = of_turn.filter(pc.equal(of_turn["arm"], arm))
            if own.num_rows:
                measures = {name: pc.mean(own[name].cast("float64")).as_py() for name in MEASURES[1:5]}
                measures["first"] = pc.mean(pc.equal(own["rank"], 1).cast("float64")).as_py()
                means[turn, arm] = measures | judged.get(arm, {})
    return means


def catalog_columns(turns: ByTurn) -> dict[str, float | None]:
    """Of the own mask, over all turns."""
    own = [measures for (_, arm), measures in turns.items() if arm == "own"]
    return {
        "dialogue_first": mean(measures["first"] for measures in own),
        "dialogue_judge": mean(measures.get("judge_consistency") for measures in own),
    }


def table(personas: Iterable[ByTurn]) -> dict[str, Any]:
    """Means over personas, as the report reads them: `columns` and `rows`."""
    means, counts = RunningMeans(), Counter[tuple[int, str]]()
    for turns in personas:
        counts.update(turns.keys())
        for key, measures in turns.items():
            for name in MEASURES:
                means.add((*key, name), measures.get(name))
    rows = []
    for turn, arm in sorted(counts, key=lambda key: (key[0], ARMS.index(key[1]))):
        rows.append([turn, arm, counts[turn, arm], *(means[turn, arm, name] for name in MEASURES)])
    return {"columns": list(COLUMNS), "rows": rows}


def render(document: Mapping[str, Any]) -> Table:
    """How often each arm is in character, turn by turn."""
    turns = sorted({row[0] for row in document["rows"]})
    shown = Table(
        title="Replies for which the own description ranks first, by turn", title_justify="left", box=None, min_width=60
    )
    for name in ("arm", *map(str, turns)):
        shown.add_column(name, justify="left" if name == "arm" else "right")
    first = {(row[0], row[1]): row[3] for row in document["rows"]}
    for arm in (arm for arm in ARMS if (turns[0], arm) in first):
        values = (first.get((turn, arm)) for turn in turns)
        shown.add_row(arm, *("" if value is None else f"{value:.2f}" for value in values))
    return shown
