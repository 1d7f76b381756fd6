"""Answers in a persona's voice: from the backbone itself, or from an OpenAI-compatible endpoint.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import PersonaError, UserError
from persona_pruner.learning.encoding import seeded
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage
from persona_pruner.synthesis.commit import Answer
from persona_pruner.synthesis.sources import Question


class RewriteError(UserError):
    """The rewriting backend refuses everything (wrong key, unknown model): the run cannot go on."""


class _RefusedError(Exception):
    """The endpoint does not want to answer this question."""


class Rewriter(Protocol):
    model: str

    def answers(self, persona: Persona, questions: Sequence[Question]) -> list[list[Answer]]:
        """For each question `samples_per_question` answers. Raises PersonaError, RewriteError."""


class SelfRewriter:
    """Samples from the unpruned backbone. Each row draws from its own generator, seeded by persona and question.

    With a sharded backbone each rank samples its part of the rows, and every rank has all answers in the end.
    """

    def __init__(self, backbone: Backbone, config: RunConfig) -> None:
        self.config = config
        self._backbone = backbone
        self.model = backbone.fingerprint[:16]
        self._runner = BackboneRunner(backbone)
        self._model: Any = backbone.model
        self._tokenizer = backbone.tokenizer
        self._end = answer_tokens(backbone.tokenizer, "a")[-1]

    @torch.no_grad()
    def answers(self, persona: Persona, questions: Sequence[Question]) -> list[list[Answer]]:
        settings, prompt = self.config.synthesis.rewrite, self.config.prompt
        samples = settings.samples_per_question
        prefix = persona_prefix(self._tokenizer, prompt, persona.description)
        suffixes = [question_suffix(self._tokenizer, prompt, persona.description, q.text) for q in questions]
        rows = sorted(
            ((len(suffix), i, sample) for i, suffix in enumerate(suffixes) for sample in range(samples)),
        )
        self._runner.masks.set(None)
        shared = self._runner.can_share([prefix], max(map(len, suffixes)) + settings.max_new_tokens)
        before = self._runner.prefix([prefix]).layers if shared else []
        found: dict[tuple[int, int], Answer] = {}
        world = self._backbone.world
        mine = rows[world.rank :: world.size]
        for start in range(0, -(-len(rows) // world.size), settings.batch_size):
            # Every rank takes part in every pass, also where no row is left for it.
            part = mine[start : start + settings.batch_size] or rows[:1]
            prompts = [suffixes[i] if shared else [*prefix, *suffixes[i]] for _, i, _ in part]
            draws = [self._draws(persona, questions[i], sample) for _, i, sample in part]
            texts = self._sample(prompts, before, torch.stack(draws))
            found |= {(i, sample): text for (_, i, sample), text in zip(part, texts, strict=True)}
        for others in self._backbone.gather(found):
            found |= others
        return [[found[i, sample] for sample in range(samples)] for i in range(len(questions))]

    def _draws(self, persona: Persona, question: Question, sample: int) -> Tensor:
        """Uniform numbers [T] that decide one answer."""
        source = seeded("rewrite", self.config.synthesis.seed, persona.id, persona.sha256, question.id, sample)
        return torch.rand(self.config.synthesis.rewrite.max_new_tokens, generator=source, dtype=torch.float64)

    def _sample(self, prompts: list[list[int]], before: list[tuple[Tensor, Tensor]], draws_BT: Tensor) -> list[Answer]:
        """Continue left-padded prompts, which stand behind the prefix whose keys and values are `before`."""
        rows, width, device = len(prompts), max(map(len, prompts)), self._backbone.device
        cache = DynamicCache()
        for layer, (key_states, value_states) in enumerate(before):
            cache.update(key_states.expand(rows, -1, -1, -1), value_states.expand(rows, -1, -1, -1), layer)
        begin = before[0][0].shape[2] if before else 0
        pads = [width - len(prompt) for prompt in prompts]
        tokens_BT = torch.tensor([[0] * n + p for n, p in zip(pads, prompts, strict=True)], device=device)
        seen_BT = torch.ones(rows, begin + width, dtype=torch.long, device=device)
        for row, pad in enumerate(pads):
            seen_BT[row, begin : begin + pad] = 0
        positions_BT = (begin + torch.arange(width, device=device) - torch.tensor(pads, device=device)[:, None]).clamp(
            0
        )
        out: list[Tensor] = []
        going_B = torch.ones(rows, dtype=torch.bool, device=device)
        for step in range(draws_BT.shape[1]):
            call = partial(
                self._model,
                tokens_BT,
                attention_mask=seen_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            chosen_B = self._choose(self._backbone.enter(call).logits[:, -1], draws_BT[:, step].to(device))
            out.append(torch.where(going_B, chosen_B, self._end))
            going_B &= chosen_B != self._end
            if not self._backbone.all_reduce(going_B.sum()):
                break
            tokens_BT, positions_BT = out[-1][:, None], positions_BT[:, -1:] + 1
            seen_BT = torch.cat([seen_BT, seen_BT.new_ones(rows, 1)], 1)
        answers = []
        for ids, unfinished in zip(torch.stack(out, 1).tolist(), going_B.tolist(), strict=True):
            ids = ids[: ids.index(self._end)] if self._end in ids else ids
            answers.append(Answer(self._tokenizer.decode(ids, skip_special_tokens=True).strip(), not unfinished))
        return answers

    def _choose(self, logits_BV: Tensor, draw_B: Tensor) -> Tensor:
        temperature = self.config.synthesis.rewrite.temperature
        if temperature == 0:
            return logits_BV.argmax(-1)
        below_BV = torch.softmax(logits_BV.double() / temperature, -1).cumsum(-1)
        wanted_B1 = (draw_B * below_BV[:, -1])[:, None]
        return torch.searchsorted(below_BV, wanted_B1, right=True).clamp_max(logits_BV.shape[-1] - 1)[:, 0]


class OpenAiRewriter:
    """Any OpenAI-compatible endpoint. The client retries with backoff and jitter and heeds Retry-After.

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

    def answers(self, persona: Persona, questions: Sequence[Question]) -> list[list[Answer]]:
        return asyncio.run(self._answers(persona, questions))

    async def _answers(self, persona: Persona, questions: Sequence[Question]) -> list[list[Answer]]:
        from openai import AsyncOpenAI

        samples = self._settings.samples_per_question
        found = self._stored(persona)
        unsaved: dict[str, Answer] = {}
        refused: dict[str, str] = {}
        gate = asyncio.Semaphore(self._settings.concurrency)
        client = AsyncOpenAI(
            base_url=self._settings.base_url, timeout=self._settings.timeout_seconds, max_retries=1_000_000
        )

        async def one(name: str, question: Question, sample: int) -> None:
            async with gate:
                await self._slot()
                try:
                    unsaved[name] = found[name] = await self._ask(client, persona, question, sample)
                except _RefusedError as error:
                    refused[name] = str(error)
                    return
                if len(unsaved) >= self.STORE_EVERY:
                    part = dict(unsaved)
                    unsaved.clear()
                    await asyncio.to_thread(self._store, persona, part)

        names = [[self._name(persona, q, sample) for sample in range(samples)] for q in questions]
        tasks = [
            asyncio.ensure_future(one(names[i][sample], question, sample))
            for i, question in enumerate(questions)
            for sample in range(samples)
            if names[i][sample] not in found
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if unsaved:
                self._store(persona, unsaved)
            await client.close()
        if refused and not found:
            raise RewriteError(f"{client.base_url}: model {self.model}: {next(iter(refused.values()))}")
        return [[found.get(name, Answer("", True)) for name in row] for row in names]

    async def _slot(self) -> None:
        if self._settings.requests_per_minute:
            now = time.monotonic()
            self._next_slot = max(now, self._next_slot + 60 / self._settings.requests_per_minute)
            await asyncio.sleep(self._next_slot - now)

    async def _ask(self, client: Any, persona: Persona, question: Question, sample: int) -> Answer:
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
                    messages=messages(self.config, persona, question),
                    temperature=self._settings.temperature,
                    max_tokens=self._settings.max_new_tokens,
                    seed=sample,
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
            what = {401: "the key is refused; check OPENAI_API_KEY", 403: "the key has no permission"}.get(
                error.status_code, f"HTTP {error.status_code}: {_one_line(error)}"
            )
            raise RewriteError(f"{client.base_url}: model {self.model}: {what}") from None
        choice = reply.choices[0]
        self._tokens += reply.usage.total_tokens if reply.usage else 0
        return Answer((choice.message.content or "").strip(), choice.finish_reason != "length")

    def _name(self, persona: Persona, question: Question, sample: int) -> str:
        asked = (
            persona.sha256,
            question.id,
            sample,
            self.model,
            self._settings.temperature,
            self._settings.with_original,
        )
        return hashlib.sha256(repr((asked, self.config.prompt)).encode()).hexdigest()[:24]

    def _stored(self, persona: Persona) -> dict[str, Answer]:
        found = {}
        for item in self._storage.list(keys.stored_answers(persona.id)):
            for name, (text, finished) in json.loads(self._storage.get(item.key)).items():
                found[name] = Answer(text, finished)
        return found

    def _store(self, persona: Persona, answers: dict[str, Answer]) -> None:
        data = json.dumps({name: (a.text, a.finished) for name, a in answers.items()}, ensure_ascii=False).encode()
        name = hashlib.sha256(data).hexdigest()[:24]
        self._storage.put(f"{keys.stored_answers(persona.id)}{name}.json", data)


def messages(config: RunConfig, persona: Persona, question: Question) -> list[dict[str, str]]:
    """The chat that asks another model for an answer in the persona's voice."""
    template = config.prompt.rewrite
    if config.synthesis.rewrite.with_original and question.answer:
        template = config.prompt.rewrite_with_reference.replace("{answer}", question.answer)
    return [
        {"role": "system", "content": config.prompt.system.replace("{persona}", persona.description)},
        {"role": "user", "content": template.replace("{question}", question.text)},
    ]


def _one_line(error: Any) -> str:
    return str(error.message).splitlines()[0][:160]
