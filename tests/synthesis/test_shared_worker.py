"""One backbone that scores, answers and trains in turn, without Ray; a whole job of this kind is in tests/cluster."""

import json

import tiny_models

from persona_pruner.config.load import check_config
from persona_pruner.learning.outcome import TrainingStatus
from persona_pruner.manifest import Persona
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis import shared_worker
from persona_pruner.synthesis.pipeline import Answering, read_inputs
from persona_pruner.synthesis.scoring_worker import open_backbone
from persona_pruner.synthesis.selection import score_and_select
from persona_pruner.synthesis.shared_worker import SharedWorker

PEOPLE = [Persona(f"p{n}", f"A person who likes {thing}") for n, thing in enumerate("abcd")]


def settings(tmp_path):
    rows = [{"instruction": f"What about {n}?", "input": "", "output": f"Plain {n}."} for n in range(8)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = tiny_models.tiny_config(tiny_models.save_tiny(tmp_path / "tiny"), steps=2).model_dump()
    values["gpus"] = 0
    values["synthesis"] |= {
        "sources": [{"path": str(tmp_path / "q.jsonl")}],
        "references": {"count": 2},
        "select": {"k": 6},
        "filter": {"min_answers": 1, "min_words": 1},
        "rewrite": {"max_new_tokens": 6},
    }
    return check_config(values)


def data_of(storage):
    return {persona.id: storage.get(keys.persona_data(persona.id)) for persona in PEOPLE}


def test_data_are_those_of_a_worker_that_only_synthesizes_also_behind_a_training(tmp_path, monkeypatch):
    config = settings(tmp_path)
    inputs = read_inputs(config, str(tmp_path / "plain"), PEOPLE)
    backbone = open_backbone(config, [q.text for q in inputs.question_set], PEOPLE)
    list(Answering(inputs, backbone)(list(score_and_select(config, backbone, inputs.question_set, PEOPLE))))

    monkeypatch.setattr(shared_worker.ray, "get", lambda reference: reference)
    output = str(tmp_path / "shared")
    worker = SharedWorker(config, output, "run", [read_inputs(config, output, PEOPLE)])
    worker.start(0, 1, "")
    first, seconds = worker.synthesize(PEOPLE[:2])
    assert [(result.persona_id, result.error) for result in first] == [("p0", None), ("p1", None)]
    assert seconds > 0
    (trained,) = worker.train(PEOPLE[:1])
    assert trained.status is TrainingStatus.DONE
    worker.synthesize(PEOPLE[2:])
    assert data_of(open_storage(output)) == data_of(open_storage(tmp_path / "plain"))


def test_ranks_that_are_not_the_first_store_nothing(tmp_path, monkeypatch):
    config = settings(tmp_path)
    monkeypatch.setattr(shared_worker.ray, "get", lambda reference: reference)
    output = str(tmp_path / "shared")
    worker = SharedWorker(config, output, "run", [read_inputs(config, output, PEOPLE)])
    monkeypatch.setattr(shared_worker.TrainingWorker, "start", lambda self, rank, size, address: {})
    worker.backbone = tiny_models.tiny(tmp_path / "another")
    worker.start(1, 2, "")
    results, _ = worker.synthesize(PEOPLE[:1])
    assert results[0].error is None
    assert not (tmp_path / "shared").exists()
