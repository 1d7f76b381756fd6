import pytest
from typer.testing import CliRunner

from persona_pruner.cli import app
from persona_pruner.errors import BackboneError, StorageError, UserError
from persona_pruner.serving import server


def invoke(*words):
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.mark.parametrize("address", ["8000", ":8000", "0.0.0.0", "host:http"])
def test_an_address_that_is_none_is_told_with_an_example(tmp_path, address):
    done = invoke("serve", tmp_path, "--backbone", "b", "--address", address)
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == f"--address {address!r}: write HOST:PORT, e.g. 0.0.0.0:8000"


def test_a_misspelt_option_does_not_pass_for_one_of_vllm(tmp_path):
    done = invoke("serve", tmp_path, "--backbone", "b", "--engine", "transformers", "--slot", "4")
    assert isinstance(done.exception, UserError)
    assert "unknown argument '--slot'" in str(done.exception)


def test_what_is_given_reaches_the_server_and_the_rest_reaches_vllm(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr(server, "serve", served.append)
    done = invoke(
        "serve", tmp_path, "--backbone", "b", "--engine", "vllm", "--address", "0.0.0.0:81", "--dtype", "bfloat16",
        "--slots", "7", "--compact", "2", "--where", "ratio==0.5", "--api-key", "k", "--", "--max-num-seqs", "4",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert served == [
        server.ServeOptions(
            str(tmp_path), "b", engine="vllm", host="0.0.0.0", port=81, dtype="bfloat16", slots=7, compact=2,
            where=("ratio==0.5",), api_keys=("k",), engine_arguments=("--max-num-seqs", "4"),
        )
    ]  # fmt: skip
    assert "api_keys" not in repr(served[0])


def test_a_backbone_that_is_not_there_is_told(tmp_path):
    done = invoke("serve", tmp_path, "--backbone", tmp_path / "absent", "--engine", "transformers")
    assert isinstance(done.exception, BackboneError)
    assert str(tmp_path / "absent") in str(done.exception)


@pytest.mark.parametrize("words", [("chat",), ("compare", "--question", "Why?")])
def test_a_persona_without_a_mask_is_told_before_the_backbone_is_loaded(tmp_path, words):
    done = invoke(*words, tmp_path, "--backbone", tmp_path / "absent", "--persona", "ada")
    assert isinstance(done.exception, StorageError)
    assert "ada" in str(done.exception)
