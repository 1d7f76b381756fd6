"""The backend `vllm`: an engine inside the answering actor. The only importer of vllm beside serving/."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import SourceError
from persona_pruner.synthesis.rewrite.base import Answer, Request, RewriteError, messages


def check_vllm() -> None:
    """Raise SourceError where vllm cannot be imported."""
    if importlib.util.find_spec("vllm") is None:
        raise SourceError("synthesis.rewrite.backend = vllm: the package vllm is not installed; use openai or self")


class VllmRewriter:
    """A Rewriter on vLLM's offline engine, which batches all requests of a call by itself.

    Each answer has its own seed; vLLM does not promise equal samples in other company. Raises RewriteError where the
    engine does not start.
    """

    def __init__(self, config: RunConfig) -> None:
        import vllm

        settings = config.synthesis.rewrite
        self.config = config
        self.model = settings.model or config.backbone.path
        self._params = vllm.SamplingParams
        try:
            self._engine = vllm.LLM(model=self.model, disable_log_stats=True, **settings.engines.options)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RewriteError(f"synthesis.rewrite.model = {self.model}: vLLM does not start: {reason}") from None

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        settings, seed = self.config.synthesis.rewrite, self.config.synthesis.seed
        chats = [messages(self.config, request.persona, request.question) for request in requests]
        sampling = [
            self._params(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                seed=seed + request.sample,
            )
            for request in requests
        ]
        try:
            return [_answer(output) for output in self._engine.chat(chats, sampling, use_tqdm=False)]
        except ValueError:
            # One prompt that is too long for the engine refuses the whole call.
            return [self._alone(chat, params) for chat, params in zip(chats, sampling, strict=True)]

    def _alone(self, chat: Any, params: Any) -> Answer:
        try:
            return _answer(self._engine.chat([chat], params, use_tqdm=False)[0])
        except ValueError:
            return Answer("", True)


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    return Answer(completion.text.strip(), completion.finish_reason != "length")
