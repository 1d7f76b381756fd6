"""vllm does not install here; its engines are stood in for by a function, all else is Ray Data as it runs."""

import json

import pyarrow.parquet as pq
import pytest
import tiny_models

from persona_pruner.config.load import check_config
from persona_pruner.errors import SourceError
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.synthesis import pipeline, vllm

PEOPLE = [Persona(f"p{n}", f"number {n}, a baker") for n in range(3)] + [Persona("endless", "A talker. " * 400)]


def config(tmp_path):
    rows = [{"instruction": f"What about {n}?", "input": "", "output": "Plain."} for n in range(12)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    synthesis = {
        "sources": [{"path": str(tmp_path / "q.jsonl")}],
        "references": {"count": 2},
        "select": {"k": 10},
        "max_prompt_tokens": 800,
        "rewrite": {"backend": "vllm", "samples_per_question": 2, "max_new_tokens": 9, "with_original": False},
    }
    backbone = {"path": str(tiny_models.save_tiny(tmp_path / "tiny"))}
    return check_config(
        {
            "backbone": backbone,
            "prompt": {"system": "You are {persona}.", "rewrite": "{question}"},
            "synthesis": synthesis,
        }
    )


def test_without_the_package_it_is_one_line(tmp_path):
    with pytest.raises(SourceError, match="the package vllm is not installed; use openai or self"):
        list(pipeline.synthesize(config(tmp_path), PEOPLE, ["p0"], str(tmp_path / "out"), PEOPLE))


def test_answers_of_mock_engines_are_put_together_by_persona(tmp_path, monkeypatch):
    import ray

    settings = config(tmp_path)

    def engines(data):
        def answer(row):
            row = vllm.request(settings, row)
            asked, number = row["messages"][-1]["content"], row["sampling_params"]["seed"]
            who = row["messages"][0]["content"].removeprefix("You are ")
            text = f" Aye, {who} I said, and {asked}"
            return vllm.reply(settings, row | {"generated_text": text, "num_generated_tokens": 9 if number else 3})

        return data.map(answer)

    monkeypatch.setattr(vllm, "check_vllm", lambda: None)
    monkeypatch.setattr(vllm, "engines", lambda config: engines)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        found = pipeline.synthesize(settings, PEOPLE, [p.id for p in PEOPLE], str(tmp_path / "out"), PEOPLE)
        results = {result.persona_id: result for result in found}
    finally:
        ray.shutdown()
    assert results.pop("endless").error[0] == "prompt_too_long"
    assert {result.error for result in results.values()} == {None}
    for persona in PEOPLE[:3]:
        table = pq.read_table(tmp_path / "out" / keys.persona_data(persona.id)).to_pylist()
        rows = [row for row in table if row["filter"] != "not_selected"]
        assert len(rows) == 20
        for row in rows:
            assert persona.description in row["answer"]
            assert row["question"] in row["answer"]
            assert row["filter"] == ("cut_off" if row["sample"] else "ok")
