"""What a worker does with its storage, without Ray and without a backbone; training itself is in tests/learning."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from mask_examples import mask

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import MaskError
from persona_pruner.learning.outcome import Curve, TrainingResult, TrainingStatus
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.training_worker import TrainingWorker, commit_mask
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "out")


def test_a_committed_mask_is_there_and_its_checkpoint_gone(storage):
    storage.put(keys.checkpoint("ada"), b"state")
    commit_mask(storage, mask("ada"))
    assert storage.get(keys.mask("ada")) == mask("ada").to_bytes()
    assert not storage.exists(keys.checkpoint("ada"))


def test_how_the_learning_went_is_kept_and_not_sent_to_the_driver(tmp_path, storage):
    curve = Curve([0.5, 0.25], [(2, 0.75)])
    learned = TrainingResult(persona_id="ada", status=TrainingStatus.DONE, mask=mask("ada"), curve=curve)
    worker = TrainingWorker(RunConfig(), str(tmp_path / "out"), "run1")
    worker.trainer = SimpleNamespace(train=lambda data, **_: [learned])
    worker._fetched = {"ada": object()}
    (result,) = worker.train([Persona("ada", "Ada")])
    assert (result.mask, result.curve) == (None, None)
    assert json.loads(storage.get(keys.curve("ada"))) == {"training": [0.5, 0.25], "heldout": [[2, 0.75]]}


def test_a_stale_mask_is_replaced(storage):
    commit_mask(storage, mask("ada", seed=1))
    commit_mask(storage, mask("ada", seed=2))
    assert storage.get(keys.mask("ada")) == mask("ada", seed=2).to_bytes()


def test_a_mask_that_is_not_what_was_written_is_an_error(storage, monkeypatch):
    monkeypatch.setattr(storage, "put_if_absent", lambda key, data: True)
    storage.put(keys.mask("ada"), mask("ada", seed=1).to_bytes())
    with pytest.raises(MaskError, match="another mask"):
        commit_mask(storage, mask("ada", seed=2))


def test_a_persona_without_data_fails_alone(tmp_path, monkeypatch):
    worker = TrainingWorker(RunConfig(), str(tmp_path / "out"), "run1")
    ada, ben = Persona("ada", "Ada"), Persona("ben", "Ben")
    done = TrainingResult(persona_id="ben", status=TrainingStatus.DONE, step=5)
    monkeypatch.setattr(worker, "_train", lambda data: {"ben": done})
    monkeypatch.setattr(worker, "_fetched", {"ben": object()})
    failed, result = worker.train([ada, ben])
    assert (failed.status, failed.cause) == (TrainingStatus.FAILED, "no_data")
    assert dataclasses.replace(result, busy_seconds=0.0) == done
    assert result.busy_seconds > 0
