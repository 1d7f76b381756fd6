"""Everything that a persona is asked in an evaluation, a kind at a time: what is stored is not asked again."""

from collections.abc import Callable, Mapping
from typing import Any

from persona_pruner.evaluation.abilities import try_abilities
from persona_pruner.evaluation.answers import answer_questions, store_rows
from persona_pruner.evaluation.baselines import Baselines
from persona_pruner.evaluation.dialogues import converse
from persona_pruner.evaluation.subject import AnswerTask, Subject, read_subject
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

KINDS: Mapping[str, Callable[[Subject], list[dict[str, Any]]]] = {
    "answers": answer_questions,
    "abilities": try_abilities,
    "dialogues": converse,
}


def missing(storage: Storage, task: AnswerTask) -> list[str]:
    """Kinds of which the rows of this very task are not stored."""
    return [
        kind
        for kind, digest in task.digests.items()
        if not storage.exists(keys.evaluation_rows(kind, task.persona_id, digest))
    ]


def answer_task(baselines: Baselines, storage: Storage, task: AnswerTask) -> int:
    """Ask one persona under every arm, measure, and store the rows. Returns how many; every rank of a group calls it.

    Raises PersonaError, MaskError, StorageError.
    """
    kinds = missing(storage, task)
    if not kinds:
        return 0
    subject = read_subject(baselines, storage, task)
    count = 0
    for kind in kinds:
        rows = KINDS[kind](subject)
        if subject.backbone.world.rank == 0:
            store_rows(storage, kind, task.persona_id, task.digests[kind], rows)
        count += len(rows)
    return count
