import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

import pytest
from command_line import run
from local_server import local_server
from tiny_models import COMMON, GATED, save_tiny, tokenizer
from transformers import AutoConfig

from persona_pruner.config.load import check_config
from persona_pruner.errors import BackboneError, ConfigError, SourceError, UserError
from persona_pruner.run.preflight import NodeGpus, check_gpus, most_gpus, preflight


def config_only(to, family, **values):
    """A model directory without weights: what a preflight may look at."""
    AutoConfig.for_model(family, **values).save_pretrained(to)
    tokenizer().save_pretrained(to)
    return to


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"{n}?", "output": "Yes."}) + "\n" for n in range(3)))
    return file


def settings(backbone, questions, **synthesis):
    source = {"path": str(questions)} | synthesis
    return check_config({"backbone": {"path": str(backbone)}, "synthesis": {"sources": [source]}})


def refusal(config, **options):
    with pytest.raises(UserError) as caught:
        preflight(config, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return type(caught.value), str(caught.value)


def test_a_model_that_can_be_used_passes_without_its_weights(tmp_path, questions):
    preflight(settings(config_only(tmp_path / "m", "llama", **GATED), questions))


def test_what_the_model_lacks_is_told_from_its_configuration(tmp_path, questions):
    bare = config_only(tmp_path / "bare", "llama", **GATED)
    (bare / "chat_template.jinja").unlink()
    quantised = config_only(tmp_path / "q", "llama", **GATED, quantization_config={"quant_method": "gptq", "bits": 4})
    mixture = config_only(tmp_path / "moe", "mixtral", **GATED)
    unknown = config_only(tmp_path / "gpt2", "gpt2", vocab_size=261, n_embd=32, n_layer=2, n_head=4)
    encoder = config_only(tmp_path / "t5", "t5", vocab_size=261, d_model=32, num_layers=2)
    for path, said in (
        (bare, "no chat template; use a chat model"),
        (quantised, "quantised checkpoints (gptq) are not supported; take the original"),
        (mixture, "mixtures of experts and other layouts cannot be masked"),
        (unknown, "0 known feed-forward blocks in 2 layers"),
        (encoder, "not a causal language model"),
    ):
        kind, message = refusal(settings(path, questions))
        assert kind is BackboneError
        assert said in message
        assert message.startswith(f"backbone.path = {path}: ")


def test_what_cannot_be_exported_is_told_before_training_is_paid_for(tmp_path, questions):
    bloom = config_only(tmp_path / "bloom", "bloom", **COMMON)
    kind, message = refusal(settings(bloom, questions))
    assert kind is BackboneError
    assert "masks could not be exported" in message
    assert "backbone.exportable" in message
    trained_anyway = {"path": str(bloom), "exportable": False}
    preflight(check_config({"backbone": trained_anyway, "synthesis": {"sources": [{"path": str(questions)}]}}))


def test_missing_columns_and_sources_are_told_from_the_first_row(tmp_path, questions):
    model = config_only(tmp_path / "m", "llama", **GATED)
    kind, message = refusal(settings(model, questions, question="prompt"))
    assert kind is SourceError
    assert "no column 'prompt'; found instruction, output" in message
    kind, message = refusal(settings(model, tmp_path / "absent.jsonl"))
    assert kind is SourceError
    preflight(settings(model, tmp_path / "absent.jsonl"), synthesis=False)


@pytest.mark.parametrize(
    ("gpus", "nodes", "refused"),
    [(2, NodeGpus(1, True), True), (1, NodeGpus(1, True), False), (2, NodeGpus(1, False), False),
     (0.5, NodeGpus(0, True), True)],
)  # fmt: skip
def test_more_gpus_than_any_node_has(gpus, nodes, refused):
    for section in ({"groups": {"num_gpus": gpus}}, {"synthesis": {"actors": {"num_gpus": gpus}}}):
        config = check_config(section)
        if refused:
            with pytest.raises(ConfigError, match=rf"num_gpus = {gpus}: no node has more than {nodes.most} GPUs"):
                check_gpus(config, nodes)
        else:
            check_gpus(config, nodes)


def test_the_largest_node_counts():
    assert most_gpus([{"CPU": 8}, {"GPU": 2.0, "CPU": 1}, {"GPU": 4}]) == 4
    assert most_gpus([{"CPU": 8}]) == 0


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated repository and for a name that is not there."""

    def do_GET(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "2")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"{}")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with local_server(Hub) as url:
        yield url


RESOLVE = """
from persona_pruner.backbone.files import resolve
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError
for name in ("someone/gated", "someone/absent"):
    try:
        resolve(BackboneConfig(path=name), weights=False)
    except BackboneError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("online", "said"),
    [(True, ["a gated model on the hub", "nor a model on the hub; check the name"]),
     (False, ["the hub cannot be reached", "the hub cannot be reached"])],
)  # fmt: skip
def test_a_hub_name_that_is_gated_or_absent_or_out_of_reach(tmp_path, hub, online, said):
    address = hub if online else "http://127.0.0.1:9"
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", RESOLVE], env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for line, text in zip(lines, said, strict=True):
        assert text in line


@pytest.fixture
def refused_run(tmp_path, questions):
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (tmp_path / "personas.jsonl").write_text('{"id": "ann", "description": "A baker."}\n')
    source = json.dumps([{"path": str(questions)}])
    (tmp_path / "run.yaml").write_text(f"backbone: {{path: {model}}}\nsynthesis: {{sources: {source}}}\n")
    return [tmp_path / "personas.jsonl", "--config", tmp_path / "run.yaml", "--output", tmp_path / "out"]


SLOW_TO_IMPORT = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported", *sorted({"ray", "deepspeed"} & set(sys.modules)))
"""


@pytest.mark.parametrize("command", ["plan", "submit", "job"])
def test_every_way_to_start_refuses_with_nothing_written(tmp_path, refused_run, command):
    if command == "job":
        words = [sys.executable, "-c", SLOW_TO_IMPORT, "jobs/prune_personas.py", *map(str, refused_run)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.splitlines()[-1] == "imported"
    else:
        done = run(command, *refused_run)
    assert done.returncode == 2, done.stderr
    assert "no chat template" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_by_plan(tmp_path, questions, refused_run):
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("")
    done = run("plan", *refused_run[:-1], tmp_path / "file" / "out")
    assert done.returncode == 4
    assert str(tmp_path / "file" / "out") in done.stderr
