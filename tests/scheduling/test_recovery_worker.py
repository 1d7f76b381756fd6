"""What the worker does with its storage, without Ray; the tuning itself is in tests/learning."""

import json

import pytest
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.config.recovery import RecoveryConfig
from persona_pruner.learning.methods.one_pass import OnePass
from persona_pruner.learning.recovery import Recovered
from persona_pruner.masks.catalog import build_catalog, update_catalog
from persona_pruner.scheduling.recovery_worker import RecoveryWorker, _Checkpoints, digest_of_mask, store
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

ANN = persona_data("Ann")


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    backbone = tiny(tmp_path_factory.mktemp("tiny"))
    (result,) = OnePass(backbone, tiny_config(method="random", ratio=0.5)).train([ANN], run_id="r")
    return result.mask


def test_losses_before_and_after_stand_in_the_catalog_until_the_mask_is_another(tmp_path, mask):
    config, storage = tiny_config(), open_storage(tmp_path / "out")
    storage.put(keys.mask("Ann"), mask.to_bytes())
    update_catalog(storage)
    _Checkpoints(storage).write_checkpoint("Ann", b"x")
    store(storage, config, Recovered("Ann", 2.5, 2.25, 6, {"adapter_model.safetensors": b"bits"}), "d", mask)
    assert storage.get(keys.recovery_file("Ann", "adapter_model.safetensors")) == b"bits"
    assert _Checkpoints(storage).read_checkpoint("Ann") is None
    update_catalog(storage, again=["Ann"])
    (row,) = build_catalog(storage).to_pylist()
    assert (row["recovery_loss_before"], row["recovery_loss_after"]) == (2.5, 2.25)
    result = json.loads(storage.get(keys.recovered("Ann")))
    storage.put(keys.recovered("Ann"), json.dumps(result | {"keep_sha256": "of another mask"}).encode())
    update_catalog(storage, fresh=True)
    (row,) = build_catalog(storage).to_pylist()
    assert (row["recovery_loss_before"], row["recovery_loss_after"]) == (None, None)


def test_what_cannot_be_tuned_is_told_and_nothing_is_stored(tmp_path, mask):
    worker = RecoveryWorker(tiny_config(), str(tmp_path / "out"))
    assert "mask.safetensors" in worker.recover("Ann")
    worker.storage.put(keys.mask("Ann"), mask.to_bytes())
    assert "synthesize first" in worker.recover("Ann")
    assert not list(worker.storage.list(keys.RECOVERY))


def test_another_setting_mask_or_data_make_another_result():
    config = tiny_config()
    other = config.model_copy(update={"recovery": RecoveryConfig(rank=3)})
    digests = {digest_of_mask(config, b"k", "d"), digest_of_mask(other, b"k", "d"), digest_of_mask(config, b"l", "d")}
    assert len(digests | {digest_of_mask(config, b"k", "e")}) == 4
