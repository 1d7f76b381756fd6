"""`persona-pruner serve`: every persona of a run behind one address, on one backbone."""

import asyncio
import contextlib
import importlib.util
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from starlette.applications import Starlette
from transformers import AutoConfig, AutoTokenizer

from persona_pruner.backbone.files import fingerprint, resolve
from persona_pruner.backbone.prompts import dated_template, knows_system_role
from persona_pruner.config.schema import BackboneConfig, StorageConfig
from persona_pruner.errors import BackboneError, ConfigError
from persona_pruner.manifest import read_manifest
from persona_pruner.masks.store import MaskStore
from persona_pruner.serving.gateway import Engine, Gateway, GatewayOptions
from persona_pruner.serving.mask_table import ffn_shape
from persona_pruner.serving.metrics import Metrics
from persona_pruner.serving.personas import PersonaOptions, Personas, read_prompt

log = logging.getLogger(__name__)
READ_SECONDS = 6
"""A request waits this long for a storage that fails."""


@dataclass(frozen=True)
class ServeOptions:
    output: str
    """Output of a run, or a directory that masks were pulled to."""
    backbone: str
    engine: Literal["vllm", "transformers"] = "transformers"
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    """Under which the backbone is served; null is the last part of its path."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    slots: int = 1024
    """Masks that lie beside the backbone at once."""
    compact: int = 0
    """Sets of compact FFN weights that are kept (vLLM)."""
    manifest: str | None = None
    """Descriptions for masks that do not carry their own."""
    where: tuple[str, ...] = ()
    refresh_seconds: float = 5.0
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    engine_arguments: tuple[str, ...] = ()
    """Passed on to vLLM as they are."""


@dataclass(frozen=True)
class Served:
    """What both engines need to serve."""

    options: ServeOptions
    path: Path
    name: str
    chat_template: str
    """The backbone's own, seeing the date that the run's prompts saw."""
    layers: int
    channels: int
    personas: Personas
    gateway: GatewayOptions
    metrics: Metrics

    def put_in_front(self, app: Starlette, engine: Engine) -> None:
        """Make the gateway the outermost layer of an engine's OpenAI server."""
        # Not add_middleware: vLLM's application is built by the time that we get it.
        inner = app.middleware_stack or app.build_middleware_stack()
        app.middleware_stack = Gateway(inner, self.personas, engine, self.gateway, self.metrics)


def prepare(options: ServeOptions) -> Served:
    """Check everything that can be checked before an engine is loaded. Raises UserError."""
    path = resolve(BackboneConfig(path=options.backbone))
    try:
        config, tokenizer = AutoConfig.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"--backbone {options.backbone}: cannot be read: {str(error).splitlines()[0]}") from None
    if not getattr(tokenizer, "chat_template", None):
        raise BackboneError(f"--backbone {options.backbone}: has no chat template; use a chat model")
    name = options.name or path.name
    if not name or ":" in name:
        raise ConfigError(f"--name {name!r}: must be text without ':', which stands between backbone and persona")
    descriptions = {}
    if options.manifest:
        descriptions = {persona.id: persona.description for persona in read_manifest(options.manifest).personas}
    store = MaskStore(options.output, StorageConfig(deadline_seconds=READ_SECONDS))
    prompt = read_prompt(store)
    metrics = Metrics()
    personas = Personas(
        store, fingerprint(path), PersonaOptions(prompt, options.where, descriptions, options.refresh_seconds), metrics
    )
    template = dated_template(tokenizer, prompt.date)
    gateway = GatewayOptions(name, knows_system_role(tokenizer), options.api_keys)
    return Served(options, path, name, template, *ffn_shape(config.get_text_config()), personas, gateway, metrics)


def serve(options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM. Raises UserError where that cannot be begun."""
    if options.engine == "vllm":
        check_vllm()
        from persona_pruner.serving.vllm_server import run
    else:
        from persona_pruner.serving.transformers_server import run
    run(prepare(options))


@contextlib.asynccontextmanager
async def application_of(served: Served) -> AsyncIterator[Starlette]:
    """The engine and its OpenAI server behind the gateway, for a host of ASGI applications. Raises UserError."""
    if served.options.engine == "vllm":
        check_vllm()
        from persona_pruner.serving.vllm_server import application

        async with application(served) as app:
            yield app
    else:
        from persona_pruner.serving.transformers_server import build

        yield await asyncio.to_thread(build, served)


def default_engine() -> Literal["vllm", "transformers"]:
    return "vllm" if importlib.util.find_spec("vllm") else "transformers"


def check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "--engine vllm: vllm is not installed here; it needs an environment of its own: `make serve` makes one "
            "(.venv-serving/bin/persona-pruner serve ...), or use --engine transformers"
        )
