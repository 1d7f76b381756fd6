"""What comes back from an engine, on its way to the client: headers are added, tokens counted, nothing else changed."""

import json
from typing import Any

from starlette.types import Message, Send

_LARGEST_COUNTED = 4 * 2**20


class AnswerTap:
    """An ASGI `send`. A stream is asked for its usage; the client sees that part only where it asked for it itself."""

    def __init__(self, send: Send, body: dict[str, Any], headers: list[tuple[bytes, bytes]]) -> None:
        self._send, self._headers = send, headers
        self.status: int | None = None
        self._usage: dict[str, Any] = {}
        self._streamed = bool(body.get("stream"))
        options = body.get("stream_options")
        self._hide_usage = self._streamed and not (isinstance(options, dict) and options.get("include_usage"))
        if self._hide_usage:
            body["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
        self._body = bytearray()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *self._headers]}
        elif message["type"] == "http.response.body":
            message = self._look(message)
        await self._send(message)

    def tokens(self) -> dict[str, int]:
        """prompt and completion tokens, as the engine counted them."""
        if not self._streamed and self.status == 200:
            self._usage = parse_object(bytes(self._body)).get("usage") or {}
        counts = {kind: self._usage.get(f"{kind}_tokens") for kind in ("prompt", "completion")}
        return {kind: count for kind, count in counts.items() if isinstance(count, int)}

    def _look(self, message: Message) -> Message:
        data: bytes = message.get("body", b"")
        if not self._streamed:
            if len(self._body) < _LARGEST_COUNTED:
                self._body += data
            return message
        if b'"usage"' not in data:
            return message
        kept = [event for event in data.split(b"\n\n") if not self._is_hidden_usage(event)]
        return {**message, "body": b"\n\n".join(kept)}

    def _is_hidden_usage(self, event: bytes) -> bool:
        usage_event = parse_object(event.removeprefix(b"data: "))
        self._usage = usage_event.get("usage") or self._usage
        return self._hide_usage and bool(usage_event.get("usage")) and usage_event.get("choices") == []


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object; empty where it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
