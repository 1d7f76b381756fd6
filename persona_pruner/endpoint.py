"""An OpenAI-compatible endpoint that is asked many things at once, within limits: at a time, per minute, in all.

The client retries with backoff and jitter and heeds Retry-After.
"""

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from persona_pruner.errors import UserError

TRIES = 3
"""For an answer that is no chat completion."""


class EndpointSettings(Protocol):
    """What the settings of whoever asks an endpoint have in common."""

    @property
    def model(self) -> str | None: ...
    @property
    def base_url(self) -> str | None: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def requests_per_minute(self) -> int | None: ...
    @property
    def timeout_seconds(self) -> float: ...
    @property
    def deadline_seconds(self) -> float: ...
    @property
    def token_budget(self) -> int | None: ...


class EndpointError(UserError):
    """The endpoint refuses everything: a wrong key, an unknown model, an answer that is none."""


class RefusedError(Exception):
    """The endpoint does not want to answer this request."""


class UnansweredError(Exception):
    """No answer to this request in time, or none that is a chat completion."""


class BudgetError(Exception):
    """`token_budget` is used up; what was answered before is kept."""


@dataclass
class Costs:
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Endpoint:
    """Use as an async context manager, in one event loop at a time. `costs` are of this process."""

    def __init__(self, settings: EndpointSettings, where: str) -> None:
        """where: names the settings in errors, such as evaluation.judges.0. Raises EndpointError."""
        if not settings.model:
            raise EndpointError(f"{where}.model is not set; name the model of the endpoint")
        if not os.environ.get("OPENAI_API_KEY"):
            raise EndpointError(f"OPENAI_API_KEY is not set where this runs; {where} needs it")
        self.costs = Costs()
        self._settings, self._where = settings, where
        self._next_slot = 0.0

    async def __aenter__(self) -> Self:
        from openai import AsyncOpenAI

        settings = self._settings
        self._client = AsyncOpenAI(base_url=settings.base_url, timeout=settings.timeout_seconds, max_retries=1_000_000)
        self._gate = asyncio.Semaphore(settings.concurrency)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def ask(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
        """The first choice of a chat completion.

        Raises RefusedError, UnansweredError, BudgetError, EndpointError.
        """
        for _ in range(TRIES):
            async with self._gate:
                await self._slot()
                budget = self._settings.token_budget
                if budget is not None and self.costs.tokens >= budget:
                    raise BudgetError(f"{self.costs.tokens} tokens paid for, {self._where}.token_budget is {budget}")
                reply = await self._reply(messages, options)
            self.costs.requests += 1
            if usage := getattr(reply, "usage", None):
                self.costs.prompt_tokens += usage.prompt_tokens
                self.costs.completion_tokens += usage.completion_tokens
            if choices := getattr(reply, "choices", None):
                return choices[0]
        raise UnansweredError(f"{self._client.base_url}: {TRIES} answers that are no chat completion")

    async def _reply(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> Any:
        """What the server says; None where that cannot be read."""
        import openai

        seconds = self._settings.deadline_seconds
        endpoint = f"{self._client.base_url}: model {self._settings.model}"
        create: Any = self._client.chat.completions.create
        try:
            async with asyncio.timeout(seconds):
                return await create(model=self._settings.model, messages=list(messages), **options)
        except TimeoutError:
            raise UnansweredError(f"no answer within {seconds:g} s ({self._where}.deadline_seconds)") from None
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise RefusedError(f"HTTP {error.status_code}: {_one_line(error)}") from None
        except openai.APIStatusError as error:
            reasons = {401: "the key is refused; check OPENAI_API_KEY", 403: "the key has no permission"}
            reason = reasons.get(error.status_code, f"HTTP {error.status_code}: {_one_line(error)}")
            raise EndpointError(f"{endpoint}: {reason}") from None
        except (openai.APIResponseValidationError, ValueError):
            return None

    async def _slot(self) -> None:
        """Wait for this request's turn under `requests_per_minute`."""
        if self._settings.requests_per_minute:
            now = time.monotonic()
            self._next_slot = max(now, self._next_slot + 60 / self._settings.requests_per_minute)
            await asyncio.sleep(self._next_slot - now)


def _one_line(error: Any) -> str:
    return str(error.message).splitlines()[0][:160]
