"""What the gateway makes of requests. Masks are real; the server behind it answers with the body that it was sent."""

import json

import pytest
from mask_examples import mask
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from persona_pruner.config.schema import PromptConfig
from persona_pruner.masks.store import MaskStore
from persona_pruner.serving.gateway import DIGEST_HEADER, MAX_BODY, PERSONA_HEADER, Gateway, GatewayOptions
from persona_pruner.serving.mask_table import RequestMask
from persona_pruner.serving.metrics import Metrics, bucket_of
from persona_pruner.serving.personas import PersonaOptions, Personas
from persona_pruner.serving.vllm_server import VllmEngine
from persona_pruner.storage import keys

QUESTION = [{"role": "user", "content": "Why?"}]


class VllmClient:
    """In the place of vLLM's own."""

    alive = True

    async def collective_rpc(self, name, timeout):
        if not self.alive:
            raise RuntimeError("the engine is dead")
        return [{"slots": 8, "slots_used": 3}]


async def echo(request):
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    return JSONResponse({"sent": await request.json(), "usage": usage})


async def plain(request):
    return PlainTextResponse("vllm_inside 1\n")


@pytest.fixture
def store(tmp_path):
    store = MaskStore(tmp_path)
    for persona_id in ("ada", "bo"):
        store.storage.put(keys.mask(persona_id), mask(persona_id, seed=len(persona_id)).to_bytes())
    return store


@pytest.fixture
def engine():
    return VllmClient()


@pytest.fixture
def serve(store, engine):
    def serve(**options):
        routes = [Route(path, echo, methods=["POST"]) for path in ("/v1/chat/completions", "/v1/completions")]
        behind = Starlette(routes=[*routes, *(Route(path, plain) for path in ("/health", "/metrics", "/inside"))])
        described = PersonaOptions(PromptConfig(system="Be {persona}."), descriptions={"ada": "Ada"})
        metrics = Metrics()
        personas = Personas(store, "f" * 64, described, metrics)
        options = GatewayOptions("llm", **options)
        return TestClient(Gateway(behind, personas, VllmEngine(engine), options, metrics))

    return serve


def chat(client, model, **body):
    return client.post("/v1/chat/completions", json={"model": model, "messages": QUESTION} | body)


@pytest.mark.parametrize("model", ["ada", "llm:ada"])
def test_a_persona_is_answered_under_its_mask_and_its_system_prompt(serve, store, model):
    answer = chat(serve(), model, temperature=0.5)
    sent = answer.json()["sent"]
    expected = RequestMask.of(store.load("ada").packed())
    assert sent["model"] == "llm"
    assert sent["messages"] == [{"role": "system", "content": "Be Ada."}, *QUESTION]
    assert sent["vllm_xargs"] == expected.extra_args()
    assert sent["temperature"] == 0.5
    assert answer.headers[DIGEST_HEADER] == expected.digest
    assert answer.headers[PERSONA_HEADER] == "ada"


def test_the_backbone_is_answered_without_a_mask(serve):
    answer = chat(serve(), "llm")
    assert answer.json()["sent"] == {"model": "llm", "messages": QUESTION}
    assert DIGEST_HEADER not in answer.headers


def test_a_template_without_a_system_role_gets_the_prompt_before_the_first_question(serve):
    sent = chat(serve(system_role=False), "ada").json()["sent"]
    assert sent["messages"] == [{"role": "user", "content": "Be Ada.\n\nWhy?"}]


def test_a_system_message_of_the_client_and_plain_completions_stay_as_they_are(serve):
    own = [{"role": "system", "content": "Be short."}, *QUESTION]
    assert chat(serve(), "ada", messages=own).json()["sent"]["messages"] == own
    sent = serve().post("/v1/completions", json={"model": "ada", "prompt": "Once"}).json()["sent"]
    assert sent["prompt"] == "Once"
    assert "vllm_xargs" in sent


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ({"model": "nobody"}, 404, "there is no persona 'nobody'"),
        ({"model": "../ada"}, 404, "there is no persona"),
        ({"model": 7}, 400, '"llm:<persona>"'),
        ({"model": "ada", "messages": "Why?"}, 400, "messages must be a list"),
        ({"model": "ada", "use_beam_search": True}, 400, "use_beam_search cannot be used here"),
        ({"model": "llm", "kv_transfer_params": {"x": 1}}, 400, "kv_transfer_params cannot be used here"),
        ({"model": "llm", "vllm_xargs": RequestMask.of(b"x").extra_args()}, 400, "name a persona"),
    ],
)
def test_what_cannot_be_answered_under_that_mask_is_refused_in_the_form_of_openai(serve, body, status, told):
    answer = serve().post("/v1/chat/completions", json={"messages": QUESTION} | body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"


def test_bodies_that_are_no_json_object_or_too_large_are_refused(serve):
    client = serve()
    for content, status in ((b"{", 400), (b"[]", 400), (b'"' + b"x" * MAX_BODY, 413)):
        assert client.post("/v1/chat/completions", content=content).status_code == status


def test_a_mask_that_does_not_verify_is_a_fault_of_the_server(serve, store):
    store.storage.put(keys.mask("bo"), b"rubbish")
    answer = chat(serve(), "bo")
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "mask_not_usable"


def test_api_keys_guard_what_answers_and_not_whether_it_lives(serve):
    client = serve(api_keys=("one", "two"))
    assert chat(client, "ada").status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer three"}).status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer two"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_models_are_the_backbone_and_its_personas(serve):
    client = serve()
    models = client.get("/v1/models").json()["data"]
    assert [(model["id"], model["parent"]) for model in models] == [
        ("llm", None),
        ("llm:ada", "llm"),
        ("llm:bo", "llm"),
    ]
    assert client.get("/v1/models/llm:bo").json()["id"] == "llm:bo"
    assert client.get("/v1/models/llm:nobody").status_code == 404


def test_nothing_else_of_the_server_behind_is_reached(serve):
    client = serve()
    assert client.get("/inside").status_code == 404
    assert client.get("/v1/chat/completions").status_code == 404
    assert client.get("/health").text == "vllm_inside 1\n"


def test_ready_means_that_the_engine_answers(serve, engine):
    client = serve()
    assert client.get("/ready").json() == {"ready": True}
    engine.alive = False
    answer = client.get("/ready")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "reason": "the engine is dead"}


def test_metrics_count_requests_tokens_and_slots_beside_those_of_the_engine(serve):
    client = serve()
    chat(client, "ada")
    chat(client, "nobody")
    lines = client.get("/metrics").text.splitlines()
    bucket = bucket_of("ada")
    for line in (
        f'persona_pruner_requests_total{{bucket="{bucket}",status="200"}} 1.0',
        'persona_pruner_requests_total{bucket="none",status="404"} 1.0',
        f'persona_pruner_tokens_total{{bucket="{bucket}",kind="completion"}} 2.0',
        "persona_pruner_mask_slots_used 3.0",
        "vllm_inside 1",
    ):
        assert line in lines


def test_metrics_say_whether_the_engine_answers(serve, engine):
    client = serve()
    assert "persona_pruner_engine_up 1.0" in client.get("/metrics").text.splitlines()
    engine.alive = False
    lines = client.get("/metrics").text.splitlines()
    assert "persona_pruner_engine_up 0.0" in lines
    assert "vllm_inside 1" in lines


def test_a_stream_is_asked_for_its_usage(serve):
    sent = json.loads(chat(serve(), "llm", stream=True).content)["sent"]
    assert sent["stream_options"] == {"include_usage": True}
