"""Ray Serve: replicas of the engine behind one address. A persona's requests go where its mask and prefix already lie.

    serve run persona_pruner.serving.ray_app:application output=s3://bucket/run backbone=B engine=vllm replicas=2

The arguments are `replicas` and the fields of `ServeOptions`. Needs `ray[serve]`.
"""

import asyncio
import dataclasses
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from persona_pruner.errors import ConfigError
from persona_pruner.serving.answers import parse_object
from persona_pruner.serving.server import ServeOptions, application_of, prepare

REPLICA_HEADER = "x-persona-replica"
_ELSEWHERE = {
    "host": "Serve's http_options",
    "port": "Serve's http_options",
    "api_keys": "the environment, VLLM_API_KEY: arguments can be read in Ray's dashboard",
}


@dataclass(frozen=True)
class ForwardedRequest:
    """An HTTP request on its way to a replica."""

    persona_id: str | None
    scope: dict[str, Any]
    """What ASGI says of it and can be sent to another process."""
    body: bytes


class PersonaAffinityRouter(RequestRouter):
    """Ranks the replicas by a hash of persona and replica: each persona has the same first, second, ... replica for
    every router, without shared state, and a replica that comes or goes moves only its own personas. Serve passes on
    what a full replica (`max_ongoing_requests`) does not take, so that a hot persona is on several.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        persona_id = pending_request.args[0].persona_id if pending_request else None
        if persona_id is None:
            return [candidate_replicas]

        def weight(replica: RunningReplica) -> bytes:
            return hashlib.sha256(f"{persona_id} {replica.replica_id.unique_id}".encode()).digest()

        return [[replica] for replica in sorted(candidate_replicas, key=weight)]


@serve.deployment(
    max_ongoing_requests=256,
    request_router_config=RequestRouterConfig(request_router_class=PersonaAffinityRouter),  # type: ignore[arg-type]
)
class PersonaReplica:
    """An engine with its gateway, in this process."""

    async def __init__(self, options: ServeOptions) -> None:  # type: ignore[misc]
        replica = serve.get_replica_context().replica_id.unique_id
        self._replica_header = (REPLICA_HEADER.encode(), replica.encode())
        served = await asyncio.to_thread(prepare, options)
        self._stack = AsyncExitStack()
        self._app = await self._stack.enter_async_context(application_of(served))
        await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))

    async def check_health(self) -> None:
        scope = _scope("GET", "/health", b"", [])
        async for message in self.answer(ForwardedRequest(None, scope, b"")):
            if message.get("status", 200) != 200:
                raise RuntimeError(f"the engine's health: HTTP {message['status']}")

    async def answer(self, request: ForwardedRequest) -> AsyncIterator[Message]:
        """The ASGI messages of the answer, as they come."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        bodies: list[Message] = [{"type": "http.request", "body": request.body, "more_body": False}]

        async def receive() -> Message:
            return bodies.pop() if bodies else await asyncio.Future()  # A client that leaves cancels this call.

        call = asyncio.ensure_future(self._app(dict(request.scope), receive, messages.put))
        call.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], self._replica_header]}
                yield message
            await call
        finally:
            call.cancel()


@serve.deployment(max_ongoing_requests=4096)
class Front:
    """Reads which persona a request names, and nothing else: the replicas' gateways check and answer it."""

    def __init__(self, replicas: Any, backbone: str) -> None:
        self._replicas, self._backbone = replicas.options(stream=True), backbone

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        model = parse_object(body).get("model")
        persona_id = model.removeprefix(f"{self._backbone}:") if isinstance(model, str) else None
        if persona_id == self._backbone:
            persona_id = None
        scope = _scope(request.method, request.url.path, request.scope["query_string"], request.headers.raw)
        messages = self._replicas.answer.remote(ForwardedRequest(persona_id, scope, body))
        start = await anext(messages)
        response = StreamingResponse(_bodies(messages), start["status"])
        response.raw_headers = start["headers"]
        return response


async def _bodies(messages: AsyncIterator[Message]) -> AsyncIterator[bytes]:
    async for message in messages:
        yield message.get("body", b"")


def _scope(method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": method,
        "path": path, "raw_path": path.encode(), "query_string": query, "root_path": "", "headers": headers,
        "client": None, "server": None, "state": {},
    }  # fmt: skip


def application(arguments: dict[str, Any]) -> serve.Application:
    """What `serve run` and a RayService import. Raises ConfigError."""
    deployment: Any = PersonaReplica
    if "replicas" in arguments:
        deployment = deployment.options(num_replicas=int(arguments["replicas"]))
    options = _options({name: value for name, value in arguments.items() if name != "replicas"})
    name = options.name or options.backbone.rstrip("/").rpartition("/")[2]
    options = dataclasses.replace(options, name=name, api_keys=tuple(filter(None, [os.environ.get("VLLM_API_KEY")])))
    return Front.bind(deployment.bind(options), name)  # type: ignore[attr-defined]


def _options(arguments: dict[str, Any]) -> ServeOptions:
    known = {field.name for field in dataclasses.fields(ServeOptions)}
    for name in arguments:
        if name in _ELSEWHERE:
            raise ConfigError(f"{name}: comes from {_ELSEWHERE[name]}")
        if name not in known:
            raise ConfigError(f"{name}: is no argument; there are {', '.join(sorted(known - _ELSEWHERE.keys()))}")
    lists = {name: [arguments[name]] for name in ("where", "engine_arguments") if isinstance(arguments.get(name), str)}
    try:
        return TypeAdapter(ServeOptions).validate_python(arguments | lists)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{first['loc'][0] if first['loc'] else 'arguments'}: {first['msg']}") from None
