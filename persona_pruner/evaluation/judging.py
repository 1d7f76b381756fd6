"""All judges on all answers of an evaluation: what is stored is not asked again, and what it cost is written down."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple

from persona_pruner.config.evaluation import JudgeConfig
from persona_pruner.config.schema import RunConfig
from persona_pruner.endpoint import BudgetError, Endpoint
from persona_pruner.evaluation.judge import inquiries, judge_persona
from persona_pruner.evaluation.summary import read_answers
from persona_pruner.evaluation.table import described
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage

PERSONAS_TOGETHER = 16
COST_COLUMNS = ("endpoint", "requests", "prompt tokens", "completion tokens")


def judge_all(
    config: RunConfig,
    storage: Storage,
    persona_ids: Sequence[str],
    should_stop: Callable[[], bool],
    count: Callable[[int], None],
) -> str | None:
    """Judge the stored answers of these personas; tells `count` how many are through, over all judges.

    Returns why it ended before the end, if it did. Raises EndpointError where an endpoint refuses everything.
    """
    for number, judge in enumerate(config.evaluation.judges):
        endpoint = Endpoint(judge, f"evaluation.judges.{number}")
        done = number * len(persona_ids)
        try:
            for start in range(0, len(persona_ids), PERSONAS_TOGETHER):
                if should_stop():
                    return "stopped"
                block = persona_ids[start : start + PERSONAS_TOGETHER]
                asyncio.run(_judge_block(config, storage, endpoint, judge, block))
                count(done + start + len(block))
        except BudgetError as error:
            return str(error)
        finally:
            _add_costs(storage, judge, endpoint)
    return None


async def _judge_block(
    config: RunConfig, storage: Storage, endpoint: Endpoint, judge: JudgeConfig, persona_ids: Sequence[str]
) -> None:
    descriptions = {persona.id: persona.description for persona in described(storage, persona_ids)}
    async with endpoint:
        calls = []
        for kind in ("answers", "dialogues"):
            for answers in read_answers(storage, config.storage.connections, persona_ids, kind):
                persona_id = answers["persona_id"][0].as_py()
                asked = inquiries(answers, descriptions[persona_id], judge, config.evaluation.judge_prompts)
                calls.append(judge_persona(endpoint, judge, storage, persona_id, asked))
        # All come to their end: what is under way is paid for.
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome


def _add_costs(storage: Storage, judge: JudgeConfig, endpoint: Endpoint) -> None:
    """Add what this process has paid to what earlier ones have."""
    if endpoint.costs.requests:
        before = _cost_rows(storage).get(judge.label, (0, 0, 0))
        store_costs(storage, judge.label, [a + b for a, b in zip(before, astuple(endpoint.costs), strict=True)])


def store_costs(storage: Storage, name: str, costs: Sequence[int]) -> None:
    """`costs`: requests, prompt tokens, completion tokens."""
    rows = _cost_rows(storage) | {name: costs}
    document = {"columns": COST_COLUMNS, "rows": [[name, *values] for name, values in sorted(rows.items())]}
    storage.put(keys.EVALUATION_COSTS, json.dumps(document).encode())


def _cost_rows(storage: Storage) -> dict[str, Sequence[int]]:
    try:
        return {row[0]: row[1:] for row in json.loads(storage.get(keys.EVALUATION_COSTS))["rows"]}
    except NotFoundError:
        return {}
