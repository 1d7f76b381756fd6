import dataclasses
import json
import shutil

import pytest
from jinja2 import TemplateError
from served_run import EXAMPLE
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from persona_pruner.errors import BackboneError, ConfigError
from persona_pruner.serving.server import ServeOptions, check_vllm, knows_system_role, prepare


@pytest.fixture
def options(tmp_path):
    return ServeOptions(str(tmp_path), str(EXAMPLE))


def test_a_backbone_is_served_under_the_name_of_its_directory_or_the_one_given(options):
    served = prepare(options)
    assert served.name == served.gateway.backbone == "backbone"
    config = json.loads((EXAMPLE / "config.json").read_text())
    assert (served.layers, served.channels) == (config["num_hidden_layers"], config["intermediate_size"])
    assert prepare(dataclasses.replace(options, name="llm")).name == "llm"


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"name": "a:b"}, ConfigError, "--name 'a:b'"),
        ({"where": ("ratio=~0.5",)}, ConfigError, "ratio=~0.5"),
        ({"backbone": "/nothing/here"}, BackboneError, "/nothing/here"),
    ],
)
def test_wrong_options_are_told_before_an_engine_is_loaded(options, change, error, told):
    with pytest.raises(error, match=told):
        prepare(dataclasses.replace(options, **change))


def test_a_model_without_a_chat_template_is_refused(options, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(EXAMPLE, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(BackboneError, match="has no chat template"):
        prepare(dataclasses.replace(options, backbone=str(bare)))


def test_the_gateway_stands_before_everything_that_the_engine_serves(options):
    class Engine:
        async def stats(self):
            return {"slots": 1, "slots_used": 0}

    async def inside(request):
        return PlainTextResponse("seen")

    app = Starlette(routes=[Route("/inside", inside), Route("/health", inside)])
    prepare(options).put_in_front(app, Engine())
    client = TestClient(app)
    assert client.get("/inside").status_code == 404
    assert client.get("/health").text == "seen"
    assert client.get("/ready").json() == {"ready": True}


def test_a_template_that_drops_or_refuses_system_messages_knows_no_system_role():
    class Tokenizer:
        def __init__(self, render):
            self.render = render

        def apply_chat_template(self, messages, **options):
            return self.render(messages)

    def refuse(messages):
        raise TemplateError("System role not supported")

    assert knows_system_role(Tokenizer(lambda messages: " ".join(message["content"] for message in messages)))
    assert not knows_system_role(Tokenizer(lambda messages: messages[-1]["content"]))
    assert not knows_system_role(Tokenizer(refuse))


def test_where_vllm_is_missing_the_message_tells_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="make serve"):
        check_vllm()
