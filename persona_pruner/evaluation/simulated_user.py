"""Who talks with a persona: an endpoint, or the unpruned backbone without the persona."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple

from persona_pruner.backbone.decoding import Prompt
from persona_pruner.backbone.prompts import question_suffix
from persona_pruner.config.evaluation import EndpointConfig
from persona_pruner.endpoint import BudgetError, Costs, Endpoint, EndpointError, RefusedError, UnansweredError
from persona_pruner.errors import PersonaError
from persona_pruner.evaluation.answers import draws
from persona_pruner.evaluation.subject import Subject
from persona_pruner.learning.persona_tokens import NOBODY, nobody_prefix
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

SPEAKERS = ("You", "The other")
SILENT = "Go on."
"""What a user says who was to say something and did not."""
Turns = tuple[tuple[str, str], ...]


class SimulatedUser:
    """Of one persona's conversations. What an endpoint said is stored and not paid for again."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.storage = subject, subject.storage
        self.settings = subject.config.evaluation.dialogues

    def say(self, conversations: Sequence[tuple[int, Turns]]) -> list[str]:
        """The user's next words in each conversation (its number, and what was said in it). Every rank of a group calls
        this and gets the same. Raises PersonaError (simulated_user)."""
        if self.settings.user is None:
            said = self._by_backbone(conversations)
        else:
            said = self._on_first_rank(self.settings.user, [self._prompt(turns) for _, turns in conversations])
        return [text or SILENT for text in said]

    def _prompt(self, turns: Turns) -> str:
        lines = [f"{speaker}: {text}" for turn in turns for speaker, text in zip(SPEAKERS, turn, strict=True)]
        return self.settings.user_prompt.replace("{conversation}", "\n".join(lines))

    def _by_backbone(self, conversations: Sequence[tuple[int, Turns]]) -> list[str]:
        backbone, prompt = self.subject.backbone, self.subject.config.prompt
        prefix = nobody_prefix(backbone, prompt)
        room = self.subject.room - len(prefix)
        prompts = []
        for number, turns in conversations:
            suffix = question_suffix(backbone.tokenizer, prompt, NOBODY, self._prompt(turns))
            while len(suffix) > room and len(turns) > 1:
                turns = turns[1:]
                suffix = question_suffix(backbone.tokenizer, prompt, NOBODY, self._prompt(turns))
            seed = draws(self.subject, f"user {len(turns)}", number)
            prompts.append(Prompt(prefix, tuple(suffix), seed))
        sampled = self.subject.decode(prompts)
        return [backbone.tokenizer.decode(each.tokens, skip_special_tokens=True).strip() for each in sampled]

    def _on_first_rank(self, user: EndpointConfig, prompts: Sequence[str]) -> list[str]:
        backbone, outcome = self.subject.backbone, (list[str](), "")
        if backbone.world.rank == 0:
            try:
                outcome = (asyncio.run(self._by_endpoint(user, prompts)), "")
            except (EndpointError, BudgetError, RefusedError, UnansweredError) as error:
                outcome = ([], str(error) or type(error).__name__)
        said, fault = backbone.gather(outcome)[0]
        if fault:
            raise PersonaError("simulated_user", f"evaluation.dialogues.user: {fault}")
        return said

    async def _by_endpoint(self, user: EndpointConfig, prompts: Sequence[str]) -> list[str]:
        answers = self.subject.config.evaluation.answers
        names = [hashlib.sha256(json.dumps([user.model, text]).encode()).hexdigest()[:24] for text in prompts]
        stored = self._stored()
        missing = {name: text for name, text in zip(names, prompts, strict=True) if name not in stored}
        fresh: dict[str, str] = {}
        endpoint = Endpoint(user, "evaluation.dialogues.user")

        async def ask(name: str, text: str) -> None:
            choice = await endpoint.ask(
                [{"role": "user", "content": text}],
                temperature=answers.temperature, top_p=answers.top_p, max_tokens=answers.max_new_tokens,
            )  # fmt: skip
            fresh[name] = (choice.message.content or "").strip()

        try:
            async with endpoint:
                # All come to their end: what is under way is paid for.
                calls = (ask(name, text) for name, text in missing.items())
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
        finally:
            if endpoint.costs.requests:
                self._store(fresh, endpoint.costs)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [(stored | fresh)[name] for name in names]

    def _store(self, said: dict[str, str], costs: Costs) -> None:
        data = json.dumps({"said": said, "costs": astuple(costs)}).encode()
        self.storage.put(keys.user_turns(self.subject.persona.id, hashlib.sha256(data).hexdigest()[:24]), data)

    def _stored(self) -> dict[str, str]:
        said: dict[str, str] = {}
        for item in self.storage.list(keys.user_turns(self.subject.persona.id)):
            said |= json.loads(self.storage.get(item.key))["said"]
        return said


def user_costs(storage: Storage) -> Costs | None:
    """What simulated users have cost in this output; None where none was asked."""
    paid = [json.loads(storage.get(item.key))["costs"] for item in storage.list(keys.user_turns())]
    return Costs(*map(sum, zip(*paid, strict=True))) if paid else None
