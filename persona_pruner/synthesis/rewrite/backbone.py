"""The backend `self`: samples from the unpruned backbone, its own distribution under the persona's prompt."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from persona_pruner import activity
from persona_pruner.backbone.continuous import decoder_for
from persona_pruner.backbone.decoding import Prompt, Sampled, Sampling
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix
from persona_pruner.config.schema import RunConfig
from persona_pruner.learning.encoding import seeded
from persona_pruner.synthesis.rewrite.base import Answer, Request

_BROKEN_END = re.compile(r"[\ufffd\s]+$")
"""A cut can leave the last character without its last bytes."""


class SelfRewriter:
    """Samples from the unpruned backbone. Each row draws from its own generator, seeded by persona, question and
    sample. With a sharded backbone each rank samples its part of the rows, and every rank has all answers in the end.
    """

    def __init__(self, backbone: Backbone, config: RunConfig) -> None:
        self.config = config
        self._backbone = backbone
        self.model = backbone.fingerprint[:16]
        self._runner = BackboneRunner(backbone)
        self._tokenizer = backbone.tokenizer
        settings = config.synthesis.rewrite
        end = answer_tokens(backbone.tokenizer, "a")[-1]
        self._sampling = Sampling(settings.temperature, settings.top_p, end, settings.batch_size)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        prompts = [self._prompt(request) for request in requests]
        # Requests of one persona stay together, for its prefix; similar lengths stand side by side.
        order = sorted(range(len(requests)), key=lambda i: (prompts[i].prefix, len(prompts[i].suffix), i))
        world = self._backbone.world
        mine = order[world.rank :: world.size]
        self._runner.masks.set(None)
        sampled = decoder_for(self._runner, self._sampling, prompts).decode([prompts[i] for i in mine])
        activity.count(activity.ANSWERING, done=len(mine), tokens=sum(len(each.tokens) for each in sampled))
        by_position: dict[int, Sampled] = {}
        for part in self._backbone.gather(dict(zip(mine, sampled, strict=True))):
            by_position |= part
        return [self._answer(by_position[i]) for i in range(len(requests))]

    def _prompt(self, request: Request) -> Prompt:
        prompt, persona, question = self.config.prompt, request.persona, request.question
        return Prompt(
            tuple(persona_prefix(self._tokenizer, prompt, persona.description)),
            tuple(question_suffix(self._tokenizer, prompt, persona.description, question.text, question.earlier)),
            self._draws(request),
        )

    def _draws(self, request: Request) -> Tensor:
        """Uniform numbers [T] that decide one answer."""
        persona, synthesis = request.persona, self.config.synthesis
        source = seeded("rewrite", synthesis.seed, persona.id, persona.sha256, request.question.id, request.sample)
        return torch.rand(synthesis.rewrite.max_new_tokens, generator=source, dtype=torch.float64)

    def _answer(self, sampled: Sampled) -> Answer:
        text = self._tokenizer.decode(sampled.tokens, skip_special_tokens=True)
        return Answer((text if sampled.finished else _BROKEN_END.sub("", text)).strip(), sampled.finished)
