"""The vLLM engine behind the gateway: vLLM's own OpenAI server, started in this process."""

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette

from persona_pruner.errors import BackboneError, ConfigError
from persona_pruner.serving.mask_table import RequestMask
from persona_pruner.serving.server import Served
from persona_pruner.serving.vllm_plugin import COMPACT, SLOTS, register

STATS_SECONDS = 10.0
_OURS = ("--model", "--host", "--port", "--dtype", "--api-key", "--served-model-name", "--additional-config",
         "--worker-extension-cls", "--middleware", "--chat-template")  # fmt: skip


class VllmEngine:
    """`client` is vLLM's AsyncLLM."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def attach(self, body: dict[str, Any], mask: RequestMask | None) -> None:
        if mask:
            extra = body.get("vllm_xargs")
            body["vllm_xargs"] = {**(extra if isinstance(extra, dict) else {}), **mask.extra_args()}

    async def stats(self) -> dict[str, float]:
        stats: list[dict[str, float]] = await self._client.collective_rpc("persona_stats", STATS_SECONDS)
        return stats[0]


def engine_options(slots: int, compact: int = 0) -> dict[str, Any]:
    """Arguments that give a vLLM engine its table of masks: `LLM(model, **engine_options(1024))`.

    A request then brings a mask as `SamplingParams(extra_args=RequestMask.of(mask.packed()).extra_args())`.
    """
    # The front end runs in this process and salts the prefix cache: without the entry point nothing else hooks into it.
    register()
    return {
        "additional_config": {SLOTS: slots, COMPACT: compact},
        "worker_extension_cls": "persona_pruner.serving.vllm_worker.PersonaWorker",
    }


def run(served: Served) -> None:
    import uvloop

    uvloop.run(_serve(served))


@contextlib.asynccontextmanager
async def application(served: Served, arguments: Any = None) -> AsyncIterator[Starlette]:
    """vLLM's `build_and_serve` up to where it would listen, with the gateway around its application."""
    from vllm.entrypoints.launchers.api_server.entry import build_app, build_async_engine_client, init_app_state

    arguments = arguments or _arguments(served)
    with tempfile.NamedTemporaryFile("w", suffix=".jinja", encoding="utf-8") as template:
        template.write(served.chat_template)
        template.flush()
        arguments.chat_template = template.name
        async with build_async_engine_client(arguments) as client:
            engine = VllmEngine(client)
            try:
                await engine.stats()
            except Exception as error:
                raise BackboneError(f"the engine has no table of masks: {error}") from None
            tasks = await client.get_supported_tasks()
            app = build_app(arguments, tasks, client.model_config)
            await init_app_state(client, app.state, arguments, tasks)
            served.put_in_front(app, engine)
            yield app


def _arguments(served: Served) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = served.options
    for argument in options.engine_arguments:
        if argument.partition("=")[0] in _OURS:
            raise ConfigError(f"{argument}: is set by persona-pruner serve; see its own options")
    engine = engine_options(options.slots, options.compact)
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        [
            "--model", str(served.path), "--served-model-name", served.name, "--dtype", options.dtype,
            "--host", options.host, "--port", str(options.port),
            "--additional-config", json.dumps(engine["additional_config"]),
            "--worker-extension-cls", engine["worker_extension_cls"],
            *(["--enforce-eager"] if options.compact else []), *options.engine_arguments,
        ]
    )  # fmt: skip
    validate_parsed_serve_args(arguments)
    return arguments


async def _serve(served: Served) -> None:
    """vLLM's `run_server`."""
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server

    arguments = _arguments(served)
    _, sock = setup_server(arguments, reuse_port=False)
    try:
        async with application(served, arguments) as app:
            stopped = await serve_http(
                app, sock=sock, enable_ssl_refresh=False, host=arguments.host, port=arguments.port,
                log_level=arguments.uvicorn_log_level, access_log=not arguments.disable_uvicorn_access_log,
                ssl_keyfile=arguments.ssl_keyfile, ssl_certfile=arguments.ssl_certfile,
            )  # fmt: skip
        await stopped
    finally:
        sock.close()
