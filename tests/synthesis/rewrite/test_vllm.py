"""What vLLM's offline engine is asked and how its outputs are read. A real engine runs where vllm is installed."""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import tiny_models

from persona_pruner.config.load import check_config
from persona_pruner.errors import SourceError
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.pipeline import synthesize
from persona_pruner.synthesis.rewrite.base import Answer, Request
from persona_pruner.synthesis.rewrite.vllm import VllmRewriter
from persona_pruner.synthesis.sources import Question

ADA = Persona("ada", "a baker")
REQUESTS = [Request(ADA, Question(str(n), "word " * length, None), n) for n, length in enumerate((1, 2, 99))]


def config(path="x", **rewrite):
    return check_config(
        {
            "backbone": {"path": str(path)},
            "prompt": {"system": "You are {persona}.", "rewrite": "{question}"},
            "synthesis": {"rewrite": {"backend": "vllm", "max_new_tokens": 16, **rewrite}},
        }
    )


@dataclass
class MockEngine:
    """Refuses a call with a long prompt whole, as the engine does; what it is asked goes into `calls`."""

    model: str
    disable_log_stats: bool
    max_model_len: int
    calls: list = field(default_factory=list)

    def chat(self, chats, sampling, use_tqdm):
        if any(len(chat[1]["content"]) > self.max_model_len for chat in chats):
            raise ValueError("The decoder prompt is longer than the maximum model length")
        self.calls.append((chats, sampling))
        reasons = ("length" if "word word" in chat[1]["content"] else "stop" for chat in chats)
        return [SimpleNamespace(outputs=[SimpleNamespace(text=" Aye. ", finish_reason=r)]) for r in reasons]


@pytest.fixture
def mock_vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM = MockEngine
    module.SamplingParams = lambda **values: values
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_mock_each_request_has_its_messages_and_seed_and_a_prompt_that_is_too_long_no_answer(mock_vllm):
    rewriter = VllmRewriter(config(top_p=0.9, engines={"options": {"max_model_len": 100}}))
    assert rewriter.answers(REQUESTS) == [Answer("Aye.", True), Answer("Aye.", False), Answer("", True)]
    engine = rewriter._engine
    assert [chats[0][0]["content"] for chats, _ in engine.calls] == ["You are a baker."] * 2
    assert [sampling["seed"] for _, sampling in engine.calls] == [0, 1]
    assert engine.calls[0][1] == {"temperature": 1.0, "top_p": 0.9, "max_tokens": 16, "seed": 0}


def test_without_the_package_it_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"instruction": "Why?", "output": "So."}\n')
    settings = config(tmp_path)
    synthesis = settings.synthesis.model_dump() | {"sources": [{"path": str(tmp_path / "q.jsonl")}]}
    settings = check_config(settings.model_dump() | {"synthesis": synthesis})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match="the package vllm is not installed; use openai or self"):
        list(synthesize(settings, [ADA], ["ada"], str(tmp_path / "out"), [ADA, ADA]))


def test_a_real_engine_answers(tmp_path):
    pytest.importorskip("vllm", reason="vllm is not installed in this environment")
    path = tiny_models.save_tiny(tmp_path)
    options = {"max_model_len": 256, "dtype": "float32", "enforce_eager": True, "max_num_seqs": 4}
    settings = config(path, engines={"num_gpus": 0, "options": options})
    answers = VllmRewriter(settings).answers(REQUESTS)
    assert len(answers) == 3
    assert answers[0].text
    assert answers[2] == Answer("", True)
