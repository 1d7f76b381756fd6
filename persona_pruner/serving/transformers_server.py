"""The embedded engine behind the gateway: transformers' own OpenAI server, one request at a time under its mask."""

import contextvars
import inspect
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from torch import Tensor
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.serving.mask_table import RequestMask
from persona_pruner.serving.server import Served

_mask: contextvars.ContextVar[RequestMask | None] = contextvars.ContextVar("mask", default=None)
"""Of the request that is being handled; read where its generation is handed to the model's thread."""


class TransformersEngine:
    def __init__(self, masks: ChannelMasks, slots: int) -> None:
        self._masks, self._slots = masks, slots
        self._resident: OrderedDict[str, Tensor] = OrderedDict()

    def attach(self, body: dict[str, Any], mask: RequestMask | None) -> None:
        body.pop("vllm_xargs", None)
        _mask.set(mask)

    async def stats(self) -> dict[str, float]:
        return {"slots": self._slots, "slots_used": len(self._resident)}

    def under_mask(self, call: Callable[..., Any], mask: RequestMask | None) -> Callable[..., Any]:
        """`call` under a mask. Only the model's one thread runs what comes out."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._masks.set(self._keep(mask) if mask else None)
            return call(*args, **kwargs)

        return run

    def _keep(self, mask: RequestMask) -> Tensor:
        """bool [L, I]."""
        keep_LI = self._resident.get(mask.digest)
        if keep_LI is None:
            unpacked_LI = torch.from_numpy(mask.keep(self._masks.layers, self._masks.channels))
            keep_LI = self._resident[mask.digest] = unpacked_LI.to(self._masks.ffns[0].output.weight.device)
            if len(self._resident) > self._slots:
                self._resident.popitem(last=False)
        self._resident.move_to_end(mask.digest)
        return keep_LI


class _MaskedManager(GenerateManager):
    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__()
        self._engine = engine

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        return super().submit(self._engine.under_mask(fn, _mask.get()), *args, **kwargs)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return super().async_submit(self._engine.under_mask(fn, _mask.get()), *args, **kwargs)


class _OneManager(GenerationState):
    """One model, one thread: every generation goes through the manager that sets the mask."""

    def __init__(self, manager: _MaskedManager) -> None:
        super().__init__()
        self._manager = manager

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        return self._manager


class _OneModel(ModelManager):
    """The backbone that is loaded already, under every name that comes here: the gateway has checked it."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self._name, self._model, self._tokenizer = name, model, tokenizer

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
        return self._name

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._model, self._tokenizer

    def shutdown(self) -> None:
        pass


def build(served: Served) -> FastAPI:
    """The application, gateway included. Raises BackboneError."""
    config = BackboneConfig(path=str(served.path), dtype=served.options.dtype)
    backbone = load_backbone(config, deepspeed=False)
    backbone.tokenizer.chat_template = served.chat_template
    engine = TransformersEngine(ChannelMasks(backbone.model).attach(), served.options.slots)
    models = _OneModel(served.name, backbone.model, backbone.tokenizer)
    state = _OneManager(_MaskedManager(engine))
    handlers: dict[str, Any] = {
        "chat_handler": ChatCompletionHandler(models, state),
        "completion_handler": CompletionHandler(models, state),
    }
    # Which others there are differs between releases; the gateway lets nothing through to them.
    unused = {name: None for name in inspect.signature(build_server).parameters if name.endswith("_handler")}
    app = build_server(models, generation_state=state, **(unused | handlers))
    served.put_in_front(app, engine)
    return app


def run(served: Served) -> None:
    uvicorn.run(build(served), host=served.options.host, port=served.options.port, log_level="warning")
