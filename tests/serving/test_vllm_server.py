import pytest

pytest.importorskip("vllm", reason="vllm has an environment of its own: make test-serving")

from api_contract import *  # noqa: F403
from server_process import running_server


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """32 slots for a thousand personas, so that masks leave all the time, and prompts in pieces of 128 tokens."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    engine = ["--kv-cache-memory-bytes", "300000000", "--max-model-len", "512", "--max-num-seqs", "32",
              "--max-num-batched-tokens", "128", "--block-size", "32", "--enforce-eager"]  # fmt: skip
    arguments = ["--slots", "32", "--where", "ratio==0.25", *engine]
    with running_server(run.output, run.backbone, "vllm", log, *arguments) as server:
        yield server


@pytest.fixture
def storm_size():
    """(personas, requests, clients)"""
    return 1000, 1000, 64
