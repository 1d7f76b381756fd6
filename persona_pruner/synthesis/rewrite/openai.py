"""The backend `openai`: any OpenAI-compatible endpoint."""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import PersonaError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.synthesis.rewrite.base import Answer, Request, RewriteError, messages


class _RefusedError(Exception):
    """The endpoint does not want to answer this question."""


class OpenAiRewriter:
    """The client retries with backoff and jitter and heeds Retry-After.

    Answers are stored as they come, so that none is paid for twice: neither by a resumed run, nor after a failure.
    """

    STORE_EVERY = 8

    def __init__(self, config: RunConfig, storage: Storage) -> None:
        settings = config.synthesis.rewrite
        if not settings.model:
            raise RewriteError("synthesis.rewrite.model is not set; name the model of the endpoint")
        if not os.environ.get("OPENAI_API_KEY"):
            raise RewriteError("OPENAI_API_KEY is not set where the job runs; the openai backend needs it")
        self.config = config
        self.model = settings.model
        self._settings = settings
        self._storage = storage
        self._tokens = 0
        self._next_slot = 0.0

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        return asyncio.run(self._answers(requests))

    async def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        from openai import AsyncOpenAI

        stored: dict[str, Answer] = {}
        for persona in {request.persona.id: request.persona for request in requests}.values():
            stored |= self._stored(persona)
        refused: dict[str, str] = {}
        client = AsyncOpenAI(
            base_url=self._settings.base_url, timeout=self._settings.timeout_seconds, max_retries=1_000_000
        )
        saver = _Saver(self._storage, self.STORE_EVERY)
        gate = asyncio.Semaphore(self._settings.concurrency)

        async def one(name: str, request: Request) -> None:
            async with gate:
                await self._slot()
                try:
                    stored[name] = await self._ask(client, request)
                except _RefusedError as error:
                    refused[name] = str(error)
                    return
                await saver.add(request.persona, name, stored[name])

        names = [self._name(request) for request in requests]
        missing = {name: request for name, request in zip(names, requests, strict=True) if name not in stored}
        tasks = [asyncio.ensure_future(one(name, request)) for name, request in missing.items()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            saver.flush()
            await client.close()
        if refused and not stored:
            raise RewriteError(f"{client.base_url}: model {self.model}: {next(iter(refused.values()))}")
        return [stored.get(name, Answer("", True)) for name in names]

    async def _slot(self) -> None:
        """Wait for this request's turn under `requests_per_minute`."""
        if self._settings.requests_per_minute:
            now = time.monotonic()
            self._next_slot = max(now, self._next_slot + 60 / self._settings.requests_per_minute)
            await asyncio.sleep(self._next_slot - now)

    async def _ask(self, client: Any, request: Request) -> Answer:
        """Raises _RefusedError, PersonaError (token_budget, rewrite_deadline), RewriteError."""
        import openai

        budget = self._settings.token_budget
        if budget is not None and self._tokens >= budget:
            raise PersonaError(
                "token_budget", f"{self._tokens} tokens paid for, synthesis.rewrite.token_budget is {budget}"
            )
        try:
            async with asyncio.timeout(self._settings.deadline_seconds):
                reply = await client.chat.completions.create(
                    model=self.model,
                    messages=messages(self.config, request.persona, request.question),
                    temperature=self._settings.temperature,
                    top_p=self._settings.top_p,
                    max_tokens=self._settings.max_new_tokens,
                    seed=request.sample,
                )
        except TimeoutError:
            seconds = self._settings.deadline_seconds
            raise PersonaError(
                "rewrite_deadline", f"no answer within {seconds:g} s (rewrite.deadline_seconds)"
            ) from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            # A server's content filter, or a prompt that is too long for it: a matter of this question.
            raise _RefusedError(f"HTTP {error.status_code}: {_one_line(error)}") from None
        except openai.APIStatusError as error:
            reason = {401: "the key is refused; check OPENAI_API_KEY", 403: "the key has no permission"}.get(
                error.status_code, f"HTTP {error.status_code}: {_one_line(error)}"
            )
            raise RewriteError(f"{client.base_url}: model {self.model}: {reason}") from None
        choice = reply.choices[0]
        self._tokens += reply.usage.total_tokens if reply.usage else 0
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


def _one_line(error: Any) -> str:
    return str(error.message).splitlines()[0][:160]
