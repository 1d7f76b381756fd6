"""Judges: what another model says of answers. Absolute scores as in the paper's evaluation, and pairs with their
positions swapped.

A score is the expectation over the number tokens among the most probable first tokens of the reply; a reply that gives
numbers less than `least_mass` of the probability has no score.
"""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from persona_pruner.config.evaluation import JudgeConfig, JudgePrompts
from persona_pruner.endpoint import Endpoint, EndpointError, RefusedError, UnansweredError
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

STORE_EVERY = 8
CONSISTENCY, COHERENCE, PREFERENCE = "consistency", "coherence", "preference"


@dataclass(frozen=True)
class Verdict:
    """One reply of a judge and what it was about."""

    judge: str
    aspect: str
    arm: str
    """In pairs, the rival of the own mask's answer."""
    number: int
    answers_sha256: str
    swapped: bool
    score: float | None
    """0 to 100, whatever the judge's scale; in pairs 100 times the probability that the own mask's answer is the better
    one. None: unscored."""
    turn: int = 0
    """Of a conversation, from 1; 0 is an answer to a question of its own."""


@dataclass(frozen=True)
class Inquiry:
    """One request to a judge: a verdict that still lacks its score."""

    verdict: Verdict
    messages: tuple[dict[str, str], ...]

    def name(self, judge: JudgeConfig) -> str:
        """Names a reply by everything that decides it."""
        asked = [judge.model, judge.top_logprobs, judge.least_mass, judge.scale, self.messages, asdict(self.verdict)]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]


def expected_score(top: Iterable[tuple[str, float]], least_mass: float, scale: int = 100) -> float | None:
    """sum p v / sum p over the tokens that are whole numbers v of 0 to `scale`, as a share of `scale` from 0 to 100;
    None where sum p < least_mass.

    `top`: (token, natural log-probability) of the first reply token's alternatives.
    """
    weighed = [(math.exp(logprob), int(token)) for token, logprob in top if _is_number(token)]
    weighed = [(p, value) for p, value in weighed if value <= scale]
    mass = sum(p for p, _ in weighed)
    return 100 / scale * sum(p * value for p, value in weighed) / mass if mass >= least_mass and mass > 0 else None


def _is_number(token: str) -> bool:
    return re.fullmatch(r"\s*\d{1,3}\s*", token) is not None


def preference(top: Iterable[tuple[str, float]], least_mass: float) -> float | None:
    """100 times the probability of "A" among "A" and "B"; None where both have less than `least_mass`."""
    shares = {"A": 0.0, "B": 0.0}
    for token, logprob in top:
        letter = token.strip().strip("()[]\"'.*").upper()
        if letter in shares:
            shares[letter] += math.exp(logprob)
    mass = sum(shares.values())
    return 100 * shares["A"] / mass if mass >= least_mass and mass > 0 else None


def inquiries(answers: pa.Table, description: str, judge: JudgeConfig, prompts: JudgePrompts) -> list[Inquiry]:
    """All that a judge is asked about one persona's answers."""
    by_question: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in answers.to_pylist():
        by_question.setdefault((row["number"], row["turn"] or 0), {})[row["arm"]] = row
    asked = []
    for (number, turn), arms in by_question.items():
        if turn and judge.turns is not None and turn not in judge.turns:
            continue
        for arm, row in arms.items():
            values = {
                "persona": description, "question": row["question"], "answer": row["text"], "scale": str(judge.scale)
            }  # fmt: skip
            for aspect in judge.aspects:
                messages = _messages(getattr(prompts, aspect), values)
                verdict = Verdict(judge.label, aspect, arm, number, _digest(row), False, None, turn)
                asked.append(Inquiry(verdict, messages))
        for rival in judge.pairs:
            # Conversations go different ways: their replies are no pairs.
            if rival in arms and "own" in arms and not turn:
                asked += _pair(arms["own"], arms[rival], description, judge, prompts)
    return asked


def _pair(
    own: Mapping[str, Any], rival: Mapping[str, Any], description: str, judge: JudgeConfig, prompts: JudgePrompts
) -> list[Inquiry]:
    """The same pair twice: the own answer first, then second."""
    asked = []
    for swapped in (False, True):
        first, second = (rival, own) if swapped else (own, rival)
        values = {"persona": description, "question": own["question"], "a": first["text"], "b": second["text"]}
        verdict = Verdict(judge.label, PREFERENCE, rival["arm"], own["number"], _digest(own, rival), swapped, None)
        asked.append(Inquiry(verdict, _messages(prompts.preference, values)))
    return asked


def _messages(template: str, values: Mapping[str, str]) -> tuple[dict[str, str], ...]:
    text = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)
    return ({"role": "user", "content": text},)


def _digest(*rows: Mapping[str, Any]) -> str:
    return hashlib.sha256("\0".join(row["text"] for row in rows).encode()).hexdigest()[:16]


async def judge_persona(
    endpoint: Endpoint, judge: JudgeConfig, storage: Storage, persona_id: str, asked: Sequence[Inquiry]
) -> None:
    """Ask what is not stored yet, and store every verdict as it comes: nothing is paid for twice, nor lost.

    Raises BudgetError where the budget is used up, EndpointError; what has come before is stored.
    """
    stored = _stored(storage, persona_id)
    missing = [(name, one) for one in asked if (name := one.name(judge)) not in stored]
    unsaved: dict[str, Verdict] = {}

    async def ask(name: str, one: Inquiry) -> None:
        try:
            unsaved[name] = await _verdict(endpoint, judge, one)
        except UnansweredError:
            return  # Nothing was said of this answer: the next evaluation asks again.
        if len(unsaved) >= STORE_EVERY:
            batch = dict(unsaved)
            unsaved.clear()
            await asyncio.to_thread(_store, storage, persona_id, batch)

    try:
        # All come to their end: what is under way is paid for.
        outcomes = await asyncio.gather(*(ask(name, one) for name, one in missing), return_exceptions=True)
    finally:
        if unsaved:
            _store(storage, persona_id, unsaved)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


async def _verdict(endpoint: Endpoint, judge: JudgeConfig, one: Inquiry) -> Verdict:
    """A judge that refuses leaves the answer unscored. Two tokens are asked for: the second one shows whether the
    number goes on."""
    try:
        choice = await endpoint.ask(
            one.messages, temperature=0.0, max_tokens=2, logprobs=True, top_logprobs=judge.top_logprobs
        )
    except RefusedError:
        return one.verdict
    content = choice.logprobs.content if choice.logprobs else None
    if not content:
        raise EndpointError(f"judge {judge.label}: the endpoint gives no log-probabilities (logprobs, top_logprobs)")
    top = [(entry.token, entry.logprob) for entry in content[0].top_logprobs]
    if one.verdict.aspect != PREFERENCE:
        whole = _has_whole_numbers([entry.token for entry in content], [token for token, _ in top], judge)
        score = expected_score(top, judge.least_mass, judge.scale) if whole else None
    else:
        score = preference(top, judge.least_mass)
        if score is not None and one.verdict.swapped:
            score = 100 - score
    return replace(one.verdict, score=score)


def _has_whole_numbers(reply: Sequence[str], alternatives: Sequence[str], judge: JudgeConfig) -> bool:
    """Whether number tokens are numbers, and not the first digits of longer ones: many tokenizers write 85 as 8 and 5.

    Raises EndpointError where the reply shows that `judge.scale` has numbers that this tokenizer splits.
    """
    if _is_number(reply[0]):
        goes_on = len(reply) > 1 and reply[1][:1].isdecimal()
        if goes_on and judge.scale > 9:
            raise EndpointError(
                f"judge {judge.label}: its tokenizer writes {reply[0].strip()}{reply[1].strip()} as two tokens, so "
                f"that numbers up to {judge.scale} cannot be read from the first one; set its scale to 9"
            )
        return not goes_on
    return judge.scale <= 9 or any(_is_number(token) and len(token.strip()) > 1 for token in alternatives)


def _store(storage: Storage, persona_id: str, verdicts: Mapping[str, Verdict]) -> None:
    data = json.dumps({name: asdict(verdict) for name, verdict in verdicts.items()}).encode()
    storage.put(keys.judgements(persona_id, hashlib.sha256(data).hexdigest()[:24]), data)


def _stored(storage: Storage, persona_id: str) -> dict[str, Verdict]:
    """By the names of their inquiries, the newest last."""
    verdicts: dict[str, Verdict] = {}
    for item in sorted(storage.list(keys.judgements(persona_id)), key=lambda item: item.modified):
        verdicts |= {name: Verdict(**value) for name, value in json.loads(storage.get(item.key)).items()}
    return verdicts


def stored_verdicts(storage: Storage, persona_id: str) -> list[Verdict]:
    """The newest, where a judge was asked about the same thing in other words or on another scale."""
    newest = {replace(verdict, score=None): verdict for verdict in _stored(storage, persona_id).values()}
    return list(newest.values())


def judged(storage: Storage, persona_id: str, answers: pa.Table) -> dict[str, dict[str, float | None]]:
    """`verdict_means` of what is stored."""
    return verdict_means(stored_verdicts(storage, persona_id), answers)


def verdict_means(verdicts: Iterable[Verdict], answers: pa.Table) -> dict[str, dict[str, float | None]]:
    """Means by arm of what all judges say of these very answers: `judge_consistency`, `judge_coherence`, and for
    rivals `preferred`, the share of pairs that the own answer wins; a pair with swapped verdicts is half a win."""
    rows = answers.select(["number", "turn", "arm", "text"]).to_pylist()
    own = {row["number"]: row for row in rows if row["arm"] == "own"}
    current = {(row["arm"], row["number"], row["turn"] or 0, _digest(row)) for row in rows}
    current |= {(r["arm"], r["number"], 0, _digest(own[r["number"]], r)) for r in rows if r["number"] in own}
    scores: dict[str, dict[str, list[float]]] = {}
    pairs: dict[tuple[str, str, int], list[float]] = {}
    for verdict in verdicts:
        place = (verdict.arm, verdict.number, verdict.turn, verdict.answers_sha256)
        if verdict.score is None or place not in current:
            continue
        if verdict.aspect == PREFERENCE:
            pairs.setdefault((verdict.judge, verdict.arm, verdict.number), []).append(verdict.score)
        else:
            scores.setdefault(verdict.arm, {}).setdefault(f"judge_{verdict.aspect}", []).append(verdict.score)
    for (_, arm, _), both in pairs.items():
        if len(both) == 2:
            wins = sum(score > 50 for score in both)
            scores.setdefault(arm, {}).setdefault("preferred", []).append(wins / 2)
    return {arm: {name: sum(v) / len(v) for name, v in values.items()} for arm, values in scores.items()}
