"""The front of a server of personas: an ASGI middleware over an OpenAI-compatible server of the bare backbone.

It takes `model` for "<backbone>:<persona>", a persona id, or the backbone; puts the persona's mask and system prompt
into the request; and lets through only what is known to be answered under that mask. Errors have OpenAI's form.
"""

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persona_pruner.errors import MaskError, StorageError
from persona_pruner.serving.answers import AnswerTap
from persona_pruner.serving.mask_table import BITS, DIGEST, RequestMask
from persona_pruner.serving.metrics import Metrics, bucket_of
from persona_pruner.serving.personas import Personas, ServedPersona, UnknownPersonaError

log = logging.getLogger(__name__)
DIGEST_HEADER, PERSONA_HEADER = "x-persona-mask-sha256", "x-persona-id"
MAX_BODY = 16 * 2**20
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_PASSED_ON = ("/health", "/version", "/ping")
_REFUSED = {
    "use_beam_search": "its beams would be searched without the mask",
    "kv_transfer_params": "keys and values belong to a mask",
}


class Engine(Protocol):
    """What the gateway needs of the server behind it."""

    def attach(self, body: dict[str, Any], mask: RequestMask | None) -> None:
        """Make the engine answer this request under `mask`; None is the unpruned backbone."""

    async def stats(self) -> dict[str, float]:
        """slots, slots_used. Raises where the engine does not answer."""


@dataclass(frozen=True)
class GatewayOptions:
    backbone: str
    """The name under which the unpruned backbone is served."""
    system_role: bool = True
    """Whether the backbone's chat template knows a system message; else its text goes before the first question."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, {"message": message, "type": _TYPES.get(status, "server_error"),
                                          "param": param, "code": code}  # fmt: skip

    def response(self) -> JSONResponse:
        headers = {"retry-after": "1"} if self.status == 503 else None
        return JSONResponse({"error": self.body}, self.status, headers)


_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
          405: "invalid_request_error", 413: "invalid_request_error"}  # fmt: skip


class Gateway:
    def __init__(
        self, app: ASGIApp, personas: Personas, engine: Engine, options: GatewayOptions, metrics: Metrics
    ) -> None:
        self._app, self._personas, self._engine, self._options, self._metrics = app, personas, engine, options, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        try:
            await self._route(scope, receive, send)
        except _Refused as refused:
            await refused.response()(scope, receive, send)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        request = Request(scope, receive)
        if path.startswith("/v1"):
            self._authenticate(request)
        if path in (_CHAT, _COMPLETIONS) and method == "POST":
            await self._generate(request, send)
        elif path == "/v1/models" or path.startswith("/v1/models/"):
            await (await self._models(path.removeprefix("/v1/models").lstrip("/")))(scope, receive, send)
        elif path == "/ready":
            await (await self._ready())(scope, receive, send)
        elif path == "/metrics":
            await (await self._render_metrics(scope))(scope, receive, send)
        elif path in _PASSED_ON:
            await self._app(scope, receive, send)
        else:
            raise _Refused(404, f"{method} {path}: not served here")

    def _authenticate(self, request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.encode()).digest()
        known = [secrets.compare_digest(digest, own) for own in self._keys]
        if self._keys and not (scheme.lower() == "bearer" and any(known)):
            raise _Refused(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")

    async def _generate(self, request: Request, send: Send) -> None:
        """1. read, 2. find the persona, 3. put mask and system prompt in, 4. pass on, 5. count what comes back."""
        persona_id: str | None = None
        try:
            body = await _read_body(request)
            persona_id = self._persona_of(body)
            persona = await self._find(persona_id)
            self._prepare(body, persona, chat=request.url.path == _CHAT)
        except _Refused as refused:
            known = persona_id is not None and refused.status != 404
            self._metrics.requests.labels(bucket_of(persona_id) if known else "none", str(refused.status)).inc()
            raise
        tap = AnswerTap(send, body, _headers(persona))
        try:
            await self._app(*_replayed(request, json.dumps(body).encode()), tap)
        finally:
            bucket = bucket_of(persona_id)
            self._metrics.requests.labels(bucket, str(tap.status or "disconnected")).inc()
            for kind, count in tap.tokens().items():
                self._metrics.tokens.labels(bucket, kind).inc(count)

    def _persona_of(self, body: dict[str, Any]) -> str | None:
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise _Refused(400, f'model must be "{self._options.backbone}:<persona>" or a persona id', param="model")
        if model == self._options.backbone:
            return None
        return model.removeprefix(f"{self._options.backbone}:")

    async def _find(self, persona_id: str | None) -> ServedPersona | None:
        if persona_id is None:
            return None
        try:
            return await self._personas.get(persona_id)
        except UnknownPersonaError as error:
            raise _Refused(404, str(error), "model_not_found", "model") from None
        except StorageError as error:
            raise _Refused(503, f"the masks cannot be read now: {error}", "storage_unreachable") from None
        except MaskError as error:
            raise _Refused(502, str(error), "mask_not_usable", "model") from None

    def _prepare(self, body: dict[str, Any], persona: ServedPersona | None, chat: bool) -> None:
        for name, reason in _REFUSED.items():
            if body.get(name):
                raise _Refused(400, f"{name} cannot be used here: {reason}", param=name)
        extra = body.get("vllm_xargs")
        if isinstance(extra, dict) and {DIGEST, BITS} & extra.keys():
            raise _Refused(400, "a request cannot bring a mask of its own; name a persona", param="vllm_xargs")
        if chat and persona and persona.system:
            self._put_system(body, persona.system)
        body["model"] = self._options.backbone
        self._engine.attach(body, persona.mask if persona else None)

    def _put_system(self, body: dict[str, Any], system: str) -> None:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise _Refused(400, "messages must be a list of objects, at least one", param="messages")
        if messages[0].get("role") in ("system", "developer"):
            return
        if self._options.system_role:
            body["messages"] = [{"role": "system", "content": system}, *messages]
        elif isinstance(messages[0].get("content"), str):
            first = messages[0] | {"content": f"{system}\n\n{messages[0]['content']}"}
            body["messages"] = [first, *messages[1:]]

    async def _models(self, name: str) -> Response:
        backbone = self._options.backbone
        if name:
            persona_id = self._persona_of({"model": name})
            await self._find(persona_id)
            return JSONResponse(_model(backbone, persona_id))
        try:
            ids = await self._personas.ids()
        except StorageError as error:
            raise _Refused(503, f"the masks cannot be listed now: {error}", "storage_unreachable") from None
        return JSONResponse({"object": "list", "data": [_model(backbone, i) for i in (None, *ids)]})

    async def _ready(self) -> Response:
        try:
            await self._engine.stats()
            await self._personas.check_readable()
        except Exception as error:
            return JSONResponse({"ready": False, "reason": str(error) or type(error).__name__}, 503)
        return JSONResponse({"ready": True})

    async def _render_metrics(self, scope: Scope) -> Response:
        try:
            stats = await self._engine.stats()
        except Exception as error:  # Each engine has its own ways to die; metrics must still be read.
            log.warning("the engine does not answer: %s", str(error) or type(error).__name__)
            self._metrics.engine_up.set(0)
        else:
            self._metrics.engine_up.set(1)
            self._metrics.slots.set(stats["slots"])
            self._metrics.slots_used.set(stats["slots_used"])
        status, text = await _call(self._app, scope)
        own = self._metrics.render()
        return Response(own + (text if status == 200 else b""), media_type="text/plain; version=0.0.4")


def _model(backbone: str, persona_id: str | None) -> dict[str, Any]:
    common = {"object": "model", "created": int(time.time()), "owned_by": "persona-pruner", "root": backbone}
    if persona_id is None:
        return {"id": backbone, **common, "parent": None}
    return {"id": f"{backbone}:{persona_id}", **common, "parent": backbone}


def _headers(persona: ServedPersona | None) -> list[tuple[bytes, bytes]]:
    if persona is None:
        return []
    headers = {DIGEST_HEADER: persona.mask.digest, PERSONA_HEADER: persona.id}
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _read_body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise _Refused(413, f"a request may have {MAX_BODY:,} bytes")
    try:
        body = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise _Refused(400, f"not JSON: {error}") from None
    if not isinstance(body, dict):
        raise _Refused(400, "the body must be a JSON object")
    return body


def _replayed(request: Request, body: bytes) -> tuple[Scope, Receive]:
    """The same request with another body."""
    kept = [(k, v) for k, v in request.scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
    scope = {**request.scope, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    receive: Callable[[], Awaitable[Message]] = request.receive

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return scope, replay


async def _call(app: ASGIApp, scope: Scope) -> tuple[int, bytes]:
    """A GET of the server behind, in this process."""
    status, body = 500, bytearray()

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        body.extend(message.get("body", b""))

    await app({**scope, "headers": []}, receive, send)
    return status, bytes(body)
