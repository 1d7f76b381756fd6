"""An OpenAI-compatible server whose log-probabilities are decided by the request alone. It counts what it is asked."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from local_server import local_server

TOKENS = ["85", "90", " 70", "100", "Sure", "101", "7", "A", "B", "-5", "eighty"]


def alternatives(text: str) -> list[tuple[str, float]]:
    """(token, log-probability) of the first reply token to a prompt."""
    weights = [1 + byte for byte in hashlib.sha256(text.encode()).digest()[: len(TOKENS)]]
    if "A or B" in text:
        weights = [weight * 1000 if token in "AB" else weight for token, weight in zip(TOKENS, weights, strict=True)]
    return [(token, math.log(weight / sum(weights))) for token, weight in zip(TOKENS, weights, strict=True)]


@dataclass
class JudgeServer:
    url: str = ""
    nonsense: int = 0
    """So many next answers are no chat completion."""
    logprobs: bool = True
    asked: list[str] = field(default_factory=list)
    """Prompts, in the order in which they came."""


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    state = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][-1]["content"]
            state.asked.append(prompt)
            body = json.dumps(reply(request, prompt)).encode()
            if state.nonsense:
                state.nonsense -= 1
                body = b"<html>it works</html>"
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    def reply(request: dict, prompt: str) -> dict:
        top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in alternatives(prompt)]
        content = [{**top[0], "top_logprobs": top[: request.get("top_logprobs", 0)]}]
        message = {"role": "assistant", "content": top[0]["token"]}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        choice["logprobs"] = {"content": content} if state.logprobs else None
        usage = {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}

    with local_server(Handler) as state.url:
        yield state
