"""The pipeline on a local Ray: what one persona does wrong is its own, what nobody can work with is one line."""

import json
from http.server import BaseHTTPRequestHandler

import pytest
import ray
import tiny_models
from local_server import local_server

from persona_pruner.config.load import check_config
from persona_pruner.dataset import read_persona_data
from persona_pruner.errors import BackboneError
from persona_pruner.manifest import Persona
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.pipeline import synthesize, tiles_of

PEOPLE = [Persona(f"p{n}", f"number {n}, a baker") for n in range(5)] + [Persona("endless", "A talker. " * 400)]


@pytest.fixture(scope="module")
def local_ray():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-test")
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


class MockEndpoint(BaseHTTPRequestHandler):
    """Repeats who is asked and what."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = f"Aye, I am {asked['messages'][0]['content']} and hear {asked['messages'][1]['content']}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    with local_server(MockEndpoint) as url:
        yield f"{url}/v1"


def config(tmp_path, backend, **settings):
    rows = [{"instruction": f"What about {n}?", "input": "", "output": f"Plain {n} answer."} for n in range(12)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    synthesis = {
        "sources": [{"path": str(tmp_path / "q.jsonl")}],
        "references": {"count": 2},
        "select": {"k": 10},
        "tile_personas": 2,
        "max_prompt_tokens": 800,
        "filter": {"min_answers": 1, "min_words": 1},
        "rewrite": {"backend": backend, "max_new_tokens": 9, **settings},
    }
    backbone = {"path": str(tiny_models.save_tiny(tmp_path / "tiny"))}
    prompt = {"system": "{persona}", "rewrite": "{question}"}
    return check_config({"backbone": backbone, "prompt": prompt, "synthesis": synthesis})


def test_tiles_are_full_where_every_worker_has_some_and_smaller_where_not():
    settings = check_config({"synthesis": {"tile_personas": 4}})
    people = [Persona(f"p{n}", "x") for n in range(18)]
    assert [len(tile) for tile in tiles_of(people, settings, 2)] == [4, 4, 4, 4, 2]
    assert [len(tile) for tile in tiles_of(people, settings, 8)] == [3] * 6
    assert [persona for tile in tiles_of(people, settings, 100) for persona in tile] == people


def test_the_first_tile_is_small_so_that_the_first_masks_come_early():
    settings = check_config({"synthesis": {"tile_personas": 16}})
    people = [Persona(f"p{n}", "x") for n in range(40)]
    tiles = tiles_of(people, settings, 2)
    assert [len(tile) for tile in tiles] == [2, 16, 16, 6]
    assert [persona for tile in tiles for persona in tile] == people


def synthesized(tmp_path, settings):
    results = synthesize(settings, PEOPLE, [p.id for p in PEOPLE], str(tmp_path / "out"), PEOPLE)
    return {result.persona_id: result for result in results}


def test_answers_of_an_endpoint_go_to_the_personas_that_were_asked(tmp_path, local_ray, endpoint):
    settings = config(tmp_path, "openai", model="m", base_url=endpoint, samples_per_question=2)
    found = synthesized(tmp_path, settings)
    assert found.pop("endless").error[0] == "prompt_too_long"
    assert {result.error for result in found.values()} == {None}
    for persona in PEOPLE[:5]:
        assert found[persona.id].usable == 20
        data = read_persona_data(open_storage(tmp_path / "out"), persona)
        for row in data.train + data.heldout:
            assert row.answer == f"Aye, I am {persona.description} and hear {row.question}"


def test_without_rewriting_the_data_are_the_original_answers(tmp_path, local_ray):
    found = synthesized(tmp_path, config(tmp_path, "none"))
    assert found.pop("endless").error[0] == "prompt_too_long"
    assert [result.counts for result in found.values()] == [{"ok": 10}] * 5
    data = read_persona_data(open_storage(tmp_path / "out"), PEOPLE[0])
    assert {row.answer for row in data.train} <= {f"Plain {n} answer." for n in range(12)}


def test_what_stops_the_scoring_actors_is_one_line(tmp_path, local_ray):
    settings = config(tmp_path, "self")
    synthesis = settings.synthesis.model_dump() | {"max_prompt_tokens": 20}
    settings = check_config(settings.model_dump() | {"synthesis": synthesis})
    people = PEOPLE[:3]
    with pytest.raises(BackboneError) as caught:
        list(synthesize(settings, people, ["p0"], str(tmp_path / "out"), people))
    assert str(caught.value) == (
        "0 of 3 reference personas fit in 10 tokens, half of synthesis.max_prompt_tokens; "
        "raise it, or shorten the descriptions"
    )
