"""The backend `openai`: any OpenAI-compatible endpoint."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import astuple

from persona_pruner.config.schema import RunConfig
from persona_pruner.endpoint import BudgetError, Endpoint, EndpointError, RefusedError, UnansweredError
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.synthesis.rewrite.base import Answer, Request, messages


class OpenAiRewriter:
    """Answers are stored as they come: none is paid for twice, neither by a resumed run nor after a failure."""

    STORE_EVERY = 8

    def __init__(self, config: RunConfig, storage: Storage) -> None:
        """Raises EndpointError."""
        self.config = config
        self._settings = config.synthesis.rewrite
        self._endpoint = Endpoint(self._settings, "synthesis.rewrite")
        self.model = str(self._settings.model)
        self._storage = storage
        self._paid_key = f"{keys.REWRITER_COSTS}{uuid.uuid4().hex}.json"

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """Raises PersonaError (token_budget, rewrite_deadline), EndpointError."""
        try:
            return asyncio.run(self._answers(requests))
        except BudgetError as error:
            raise PersonaError("token_budget", str(error)) from None
        except UnansweredError as error:
            raise PersonaError("rewrite_deadline", str(error)) from None
        finally:
            if self._endpoint.costs.requests:
                paid = {"model": self.model, "costs": astuple(self._endpoint.costs)}
                self._storage.put(self._paid_key, json.dumps(paid).encode())

    async def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        stored: dict[str, Answer] = {}
        for persona in {request.persona.id: request.persona for request in requests}.values():
            stored |= self._stored(persona)
        refused: dict[str, str] = {}
        saver = _Saver(self._storage, self.STORE_EVERY)

        async def one(name: str, request: Request) -> None:
            try:
                stored[name] = await self._ask(request)
            except RefusedError as error:
                refused[name] = str(error)
                return
            await saver.add(request.persona, name, stored[name])

        names = [self._name(request) for request in requests]
        missing = {name: request for name, request in zip(names, requests, strict=True) if name not in stored}
        async with self._endpoint:
            tasks = [asyncio.ensure_future(one(name, request)) for name, request in missing.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                saver.flush()
        if refused and not stored:
            raise EndpointError(f"{self._settings.base_url}: model {self.model}: {next(iter(refused.values()))}")
        return [stored.get(name, Answer("", True)) for name in names]

    async def _ask(self, request: Request) -> Answer:
        choice = await self._endpoint.ask(
            messages(self.config, request.persona, request.question),
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            max_tokens=self._settings.max_new_tokens,
            seed=request.sample,
        )
        return Answer((choice.message.content or "").strip(), choice.finish_reason != "length")

    def _name(self, request: Request) -> str:
        """Names an answer by everything that decides it."""
        settings = self._settings
        sampling = (self.model, settings.temperature, settings.top_p, settings.max_new_tokens)
        chat = messages(self.config, request.persona, request.question)
        asked = json.dumps([request.persona.sha256, request.sample, sampling, chat])
        return hashlib.sha256(asked.encode()).hexdigest()[:24]

    def _stored(self, persona: Persona) -> dict[str, Answer]:
        answers = {}
        for item in self._storage.list(keys.stored_answers(persona.id)):
            for name, (text, finished) in json.loads(self._storage.get(item.key)).items():
                answers[name] = Answer(text, finished)
        return answers


class _Saver:
    """Stores paid answers, some at a time."""

    def __init__(self, storage: Storage, every: int) -> None:
        self._storage, self._every = storage, every
        self._unsaved: dict[str, dict[str, Answer]] = {}

    async def add(self, persona: Persona, name: str, answer: Answer) -> None:
        unsaved = self._unsaved.setdefault(persona.id, {})
        unsaved[name] = answer
        if len(unsaved) >= self._every:
            await asyncio.to_thread(self._store, persona.id, self._unsaved.pop(persona.id))

    def flush(self) -> None:
        for persona_id, unsaved in self._unsaved.items():
            self._store(persona_id, unsaved)

    def _store(self, persona_id: str, answers: dict[str, Answer]) -> None:
        data = json.dumps({name: (a.text, a.finished) for name, a in answers.items()}, ensure_ascii=False).encode()
        name = hashlib.sha256(data).hexdigest()[:24]
        self._storage.put(f"{keys.stored_answers(persona_id)}{name}.json", data)
