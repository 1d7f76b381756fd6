"""What a client sees of `persona-pruner serve`, the same for every engine: imported by the test file of each.

That file gives `server` (a Server over `run`) and `storm_size` of its engine.
"""

import asyncio
import random
import threading
import time

import openai
import psutil
import pytest
from served_run import PERSONAS, SYSTEM, description_of

from persona_pruner.storage import keys

QUESTIONS = ["Who are you and what do you do all day?", "What should I have for breakfast? Explain why."]
TOKENS = 12


def chat(client, model, question, **options):
    settings = {"temperature": 0, "max_tokens": TOKENS} | options
    messages = settings.pop("messages", [{"role": "user", "content": question}])
    return client.chat.completions.with_raw_response.create(model=model, messages=messages, **settings)


async def ask_all(server, requests):
    async with server.client() as client:
        return await asyncio.gather(*[chat(client, model, question) for model, question in requests])


def ask(server, model, question=QUESTIONS[0], **options):
    async def run():
        async with server.client() as client:
            return await chat(client, model, question, **options)

    return asyncio.run(run())


def text_of(answer):
    return answer.parse().choices[0].message.content


def digest_of(mask):
    from persona_pruner.serving.mask_table import RequestMask

    return RequestMask.of(mask.packed()).digest


@pytest.mark.parametrize("cache", ["cold", "warm"])
def test_rows_of_one_batch_equal_plain_transformers_with_that_mask_alone(server, run, cache):
    rows = [(persona, question) for question in QUESTIONS for persona in (None, *PERSONAS)]
    answers = asyncio.run(ask_all(server, [(f"backbone:{p}" if p else "backbone", q) for p, q in rows]))
    for (persona, question), answer in zip(rows, answers, strict=True):
        mask = run.mask(persona) if persona else None
        assert text_of(answer) == run.greedy_text(mask, run.prompt(persona, question), TOKENS), (persona, question)
        assert answer.headers.get("x-persona-mask-sha256") == (digest_of(mask) if mask else None)
        assert answer.headers.get("x-persona-id") == persona
    assert len({text_of(answer) for answer in answers}) > len(rows) // 2


def test_a_stream_brings_the_same_text_and_no_usage_that_was_not_asked_for(server, run):
    async def read():
        async with server.client() as client:
            stream = await client.chat.completions.create(
                model=PERSONAS[1], messages=[{"role": "user", "content": QUESTIONS[0]}], temperature=0,
                max_tokens=TOKENS, stream=True,
            )  # fmt: skip
            return [chunk async for chunk in stream]

    chunks = asyncio.run(read())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == run.greedy_text(run.mask(PERSONAS[1]), run.prompt(PERSONAS[1], QUESTIONS[0]), TOKENS)
    assert all(chunk.choices for chunk in chunks)


def test_plain_completions_are_under_the_mask_too(server, run):
    async def complete():
        async with server.client() as client:
            return await client.completions.create(
                model=PERSONAS[2], prompt="The sea", temperature=0, max_tokens=TOKENS
            )

    prompt = run.tokenizer("The sea")["input_ids"]
    assert asyncio.run(complete()).choices[0].text == run.greedy_text(run.mask(PERSONAS[2]), prompt, TOKENS)


def test_a_request_may_bring_its_own_system_message(server, run):
    own = [{"role": "system", "content": "Speak of apples."}, {"role": "user", "content": QUESTIONS[0]}]
    ids = run.tokenizer.apply_chat_template(own, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = ask(server, PERSONAS[3], messages=own)
    assert text_of(answer) == run.greedy_text(run.mask(PERSONAS[3]), list(ids), TOKENS)
    assert SYSTEM.replace("{persona}", description_of(PERSONAS[3])) != own[0]["content"]


def test_models_are_the_backbone_and_its_personas(server):
    models = {model["id"]: model for model in server.request("GET", "/v1/models").json()["data"]}
    assert models["backbone"]["parent"] is None
    assert all(models[f"backbone:{persona}"]["parent"] == "backbone" for persona in PERSONAS)
    assert server.request("GET", f"/v1/models/backbone:{PERSONAS[0]}").json()["id"] == f"backbone:{PERSONAS[0]}"
    assert server.request("GET", "/v1/models/nobody").status_code == 404


@pytest.mark.parametrize(
    "model",
    ["nobody", "backbone:nobody", f"../masks/{PERSONAS[0]}", f"backbone:../../run/masks/{PERSONAS[0]}",
     f"%2e%2e%2fmasks%2f{PERSONAS[0]}", "s3://bucket/run", "/etc/passwd", f"{PERSONAS[0]}/mask.safetensors",
     f"{PERSONAS[0]}\x00", "other:" + PERSONAS[0], "x" * 5000, "hidden-one"],
)  # fmt: skip
def test_only_ids_of_this_run_that_the_server_may_show_are_found(server, run, model):
    run.commit(run.mask("hidden-one", ratio=0.5))  # The server was started with --where ratio==0.25.
    with pytest.raises(openai.NotFoundError) as caught:
        ask(server, model)
    assert caught.value.code == "model_not_found"
    assert "hidden-one" not in server.request("GET", "/v1/models").text


def test_a_mask_that_does_not_verify_is_refused_with_the_reason_and_nothing_else_answers(server, run):
    path = run.output / keys.mask("broken")
    run.commit(run.mask("broken"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server, "broken")
    assert caught.value.status_code == 502
    assert keys.mask("broken") in str(caught.value)
    stranger = run.mask("stranger")
    path = run.output / keys.mask("misplaced")
    path.parent.mkdir(parents=True)
    path.write_bytes(stranger.to_bytes())
    with pytest.raises(openai.APIStatusError, match="stranger"):
        ask(server, "misplaced")


def test_a_retrained_mask_is_used_soon_and_a_removed_one_no_longer(server, run):
    question, prompt = QUESTIONS[1], run.prompt("changing", QUESTIONS[1])
    for version in (0, 1, 2):
        mask = run.mask("changing", version)
        run.commit(mask)
        server.refreshed()
        for _ in ("cold", "warm"):
            answer = ask(server, "changing", question)
            assert answer.headers["x-persona-mask-sha256"] == digest_of(mask)
            assert text_of(answer) == run.greedy_text(mask, prompt, TOKENS)
    (run.output / keys.mask("changing")).unlink()
    server.refreshed()
    with pytest.raises(openai.NotFoundError):
        ask(server, "changing", question)


def test_without_a_key_nothing_is_answered(server):
    for key in ("", "wrong"):
        answer = server.request("GET", "/v1/models", key=key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert server.request("GET", "/health", key="").status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"[" * 100_000, b'{"model": 3}', b'{"model": "keeper-0"}',
     b'{"model": "keeper-0", "messages": "hello"}', b'{"model": "keeper-0", "messages": []}',
     b'{"model": "keeper-0", "messages": [3]}',
     b'{"model": "keeper-0", "messages": [{"role": "user", "content": "?"}], "use_beam_search": true}',
     b'{"model": "keeper-0", "messages": [{"role": "user", "content": "?"}], "vllm_xargs": {"persona_bits": "AAAA"}}'],
)  # fmt: skip
def test_no_request_ends_the_server(server, body):
    answer = server.request("POST", "/v1/chat/completions", data=body)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"]
    assert server.request("GET", "/ready").status_code == 200


def test_what_is_not_known_to_be_answered_under_a_mask_is_not_served(server):
    for method, path in (
        ("POST", "/v1/responses"),
        ("POST", "/v1/embeddings"),
        ("POST", "/tokenize"),
        ("POST", "/reset"),
    ):
        assert server.request(method, path, json={"model": PERSONAS[0], "input": "?"}).status_code == 404


def test_metrics_count_requests_tokens_and_masks(server):
    ask(server, PERSONAS[0])
    lines = server.request("GET", "/metrics").text.splitlines()
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
    names = ("requests_total", "tokens_total", "mask_loads_total", "mask_load_seconds_count", "mask_slots_used")
    totals = {n: sum(v for key, v in values.items() if key.startswith(f"persona_pruner_{n}")) for n in names}
    assert all(totals.values()), totals
    assert not any(PERSONAS[0] in line for line in lines)


class _Storm:
    """Replaces, corrupts, removes and restores masks, and knows what every persona may have answered with."""

    def __init__(self, run, names):
        self.run, self.names = run, names
        self.random = random.Random(0)
        self.versions = dict.fromkeys(names, 0)
        self.digests = {name: {digest_of(run.mask(name))} for name in names}
        self.state = dict.fromkeys(names, "whole")
        self.corrupted, self.removed = set(), set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _work(self):
        while not self._stop.is_set():
            name = self.random.choice(self.names)
            path = self.run.output / keys.mask(name)
            action = self.random.choice(["replace", "replace", "corrupt", "remove"])
            if action == "replace":
                self.versions[name] += 1
                mask = self.run.mask(name, self.versions[name])
                self.digests[name].add(digest_of(mask))
                self.run.commit(mask)
                self.state[name] = "whole"
            elif action == "corrupt":
                self.corrupted.add(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.run.mask(name).to_bytes()[: self.random.randrange(900)])
                self.state[name] = "corrupt"
            else:
                self.removed.add(name)
                path.unlink(missing_ok=True)
                self.state[name] = "removed"
            time.sleep(0.005)


def test_many_clients_while_masks_are_replaced_corrupted_and_removed_get_the_right_mask_or_a_refusal(
    server, run, storm_size
):
    """No wrong persona, no hang, no crash, bounded memory."""
    personas, requests, clients = storm_size
    names = [f"npc-{number}" for number in range(personas)]
    run.commit(*[run.mask(name) for name in names])
    wanted = random.Random(1).choices(names, k=requests)
    memory = psutil.Process(server.process.pid).memory_info().rss
    answers, queue = [], list(enumerate(wanted))

    async def one_client(client):
        while queue:
            number, name = queue.pop()
            try:
                answer = await chat(client, name, f"{QUESTIONS[number % 2]} {number % 7}", max_tokens=2)
                answers.append((name, 200, answer.headers["x-persona-mask-sha256"], answer.headers["x-persona-id"]))
            except openai.APIStatusError as error:
                answers.append((name, error.status_code, None, None))

    async def all_clients():
        async with server.client() as client:
            await asyncio.gather(*[one_client(client) for _ in range(clients)])

    with _Storm(run, names) as storm:
        asyncio.run(asyncio.wait_for(all_clients(), 600))
    assert len(answers) == requests
    for name, status, digest, persona in answers:
        assert status in (200, 404, 502)
        assert status != 200 or (digest in storm.digests[name] and persona == name)
        assert status != 404 or name in storm.removed
        assert status != 502 or name in storm.corrupted
    assert sum(status == 200 for _, status, *_ in answers) > requests // 2
    server.refreshed()
    expected = {"whole": 200, "corrupt": 502, "removed": 404}
    for name in random.Random(2).sample(sorted(storm.corrupted | storm.removed), 10):
        body = {"model": name, "messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
        answer = server.request("POST", "/v1/chat/completions", json=body)
        assert answer.status_code == expected[storm.state[name]]
        if answer.status_code == 200:
            assert answer.headers["x-persona-mask-sha256"] == digest_of(run.mask(name, storm.versions[name]))
    assert psutil.Process(server.process.pid).memory_info().rss < memory + 300 * 2**20
