import asyncio
import json

from persona_pruner.serving.answers import AnswerTap

USAGE = {"prompt_tokens": 5, "completion_tokens": 2}
CONTENT = b'data: {"choices": [{"delta": {"content": "A"}}]}\n\n'
LAST = b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"


def pass_through(body, *pieces):
    """(tap, what the client saw)"""
    seen = []

    async def send(message):
        seen.append(message)

    async def run():
        tap = AnswerTap(send, body, [(b"x-persona-id", b"cora")])
        await tap({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        for piece in pieces:
            await tap({"type": "http.response.body", "body": piece, "more_body": True})
        return tap

    tap = asyncio.run(run())
    assert seen[0]["headers"] == [(b"a", b"b"), (b"x-persona-id", b"cora")]
    return tap, b"".join(message["body"] for message in seen[1:])


def test_an_answer_passes_unchanged_and_its_tokens_are_counted():
    text = json.dumps({"choices": [], "usage": USAGE}).encode()
    tap, seen = pass_through({}, text[:10], text[10:])
    assert seen == text
    assert tap.tokens() == {"prompt": 5, "completion": 2}


def test_usage_of_a_stream_is_asked_for_and_kept_from_a_client_that_did_not_ask():
    body = {"stream": True}
    tap, seen = pass_through(body, CONTENT, LAST, b"data: [DONE]\n\n")
    assert body["stream_options"] == {"include_usage": True}
    assert seen == CONTENT + b"data: [DONE]\n\n"
    assert tap.tokens() == {"prompt": 5, "completion": 2}


def test_a_client_that_asks_for_usage_gets_it():
    tap, seen = pass_through({"stream": True, "stream_options": {"include_usage": True}}, CONTENT, LAST)
    assert seen == CONTENT + LAST
    assert tap.tokens() == {"prompt": 5, "completion": 2}
