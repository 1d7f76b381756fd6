"""Ray Serve in front of two replicas, over HTTP, in a Ray of its own; the transformers engine starts in seconds."""

import asyncio
import itertools
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve", reason="ray[serve] is in vllm's environment: make test-serving", exc_type=ImportError)

import ray
import requests
import yaml
from ray import serve
from served_run import PERSONAS

from persona_pruner.errors import ConfigError
from persona_pruner.serving.mask_table import RequestMask
from persona_pruner.serving.ray_app import REPLICA_HEADER, Front, PersonaAffinityRouter, PersonaReplica, application

ROOT = Path(__file__).parents[2]
QUESTION = "Who are you and what do you do all day?"
TOKENS = 8


def ranked(persona_id, replicas):
    wrapped = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in replicas]
    request = SimpleNamespace(args=[SimpleNamespace(persona_id=persona_id)])
    ranks = asyncio.run(PersonaAffinityRouter.choose_replicas(None, wrapped, request))
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


def test_each_persona_has_its_own_order_of_replicas_and_a_lost_replica_moves_only_its_personas():
    firsts = {}
    for number in range(200):
        order = ranked(f"p{number}", "abcd")
        firsts.setdefault(order[0][0], []).append(number)
        assert order == ranked(f"p{number}", "dcab")
        assert ranked(f"p{number}", "abd") == [rank for rank in order if rank != ["c"]]
    assert all(20 < len(firsts[name]) < 80 for name in "abcd")


def test_unpruned_requests_may_go_anywhere():
    assert ranked(None, "abc") == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [({"bakbone": "B"}, "bakbone"), ({"host": "::"}, "http_options"), ({"api_keys": "x"}, "VLLM_API_KEY"),
     ({"slots": "many"}, "slots"), ({"output": "o"}, "backbone")],
)  # fmt: skip
def test_wrong_arguments_are_told_before_anything_is_deployed(arguments, told):
    with pytest.raises(ConfigError, match=told):
        application({"output": "o", "backbone": "B"} | arguments if told != "backbone" else arguments)


def test_the_kubernetes_file_names_what_there_is():
    """Against Serve's own schema; the cluster in it is looked at in tests/cluster_files."""
    from ray.serve.schema import ServeDeploySchema

    service = yaml.safe_load((ROOT / "cluster" / "kuberay" / "components" / "serving" / "rayservice.yaml").read_text())
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (app,) = config.applications
    assert app.import_path == f"{application.__module__}:{application.__name__}"
    application(app.args)
    assert {deployment.name for deployment in app.deployments} == {Front.name, PersonaReplica.name}


@pytest.fixture(scope="module")
def url(run, monkeypatch_module):
    monkeypatch_module.delenv("VLLM_API_KEY", raising=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(address="local", num_cpus=8, include_dashboard=False, namespace="serving")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {"output": str(run.output), "backbone": str(run.backbone), "engine": "transformers", "replicas": 2}
        serve.run(application(arguments | {"where": "ratio==0.25"}), route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


def ask(url, model, **options):
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": TOKENS}
    return requests.post(f"{url}/v1/chat/completions", json=body | options, timeout=300)


def test_answers_are_those_of_one_server(url, run):
    for persona in PERSONAS[:4]:
        mask = run.mask(persona)
        answer = ask(url, f"backbone:{persona}")
        text = answer.json()["choices"][0]["message"]["content"]
        assert text == run.greedy_text(mask, run.prompt(persona, QUESTION), TOKENS)
        assert answer.headers["x-persona-mask-sha256"] == RequestMask.of(mask.packed()).digest
    assert ask(url, "nobody").status_code == 404
    assert requests.get(f"{url}/v1/models/{PERSONAS[0]}", timeout=300).json()["parent"] == "backbone"


def test_a_stream_comes_in_pieces(url):
    events = [line for line in ask(url, PERSONAS[0], stream=True).text.splitlines() if line.startswith("data: ")]
    assert len(events) > 3


def test_requests_of_a_persona_go_to_one_replica_and_personas_are_spread(url):
    """Serve falls back to the other replica where the first does not answer in time: repeated until all is quiet."""
    end = time.monotonic() + 240
    while time.monotonic() < end:
        homes = {p: {ask(url, p, max_tokens=1).headers[REPLICA_HEADER] for _ in range(5)} for p in PERSONAS}
        if all(len(home) == 1 for home in homes.values()):
            break
    else:
        raise AssertionError(homes)
    assert len(set(itertools.chain(*homes.values()))) <= 2
