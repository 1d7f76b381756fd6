"""What the job decides before anything starts; a whole job is in tests/cluster."""

import importlib.util
import io
import json

import pytest
from mask_examples import mask
from rich.console import Console
from tiny_models import save_tiny, tiny_config

from persona_pruner.config.schema import GroupsConfig
from persona_pruner.errors import ConfigError, UserError
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.run.recover import RecoveryRequest, check, digests, result, run_recovery
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(save_tiny(tmp_path_factory.mktemp("backbone") / "tiny"))


@pytest.fixture
def storage(tmp_path):
    storage = open_storage(tmp_path / "out")
    for name in ("ada", "ben"):
        storage.put(keys.mask(name), mask(name).to_bytes())
    return storage


def test_shards_and_a_missing_peft_are_refused_in_one_line(config, storage, monkeypatch):
    with pytest.raises(ConfigError, match=r"groups.shards = 2: .* set it to 1"):
        check(config.model_copy(update={"groups": GroupsConfig(shards=2)}), storage)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'persona-pruner\[recover\]'"):
        check(config, storage)


def test_all_masks_or_those_named_are_tuned(config, storage):
    request = RecoveryRequest(config=config, output=storage.url)
    found = digests(request, storage)
    assert list(found) == ["ada", "ben"]
    assert list(digests(RecoveryRequest(config=config, output=storage.url, personas=("ben",)), storage)) == ["ben"]
    with pytest.raises(UserError, match="--persona cy: "):
        digests(RecoveryRequest(config=config, output=storage.url, personas=("cy",)), storage)
    storage.put(keys.recovered("ada"), json.dumps({"digest": found["ada"]}).encode())
    assert result(storage, "ada", found["ada"]) == {"digest": found["ada"]}
    assert result(storage, "ada", "another") is None
    assert result(storage, "ben", found["ben"]) is None


def test_what_is_tuned_already_starts_nothing(config, storage):
    for name, digest in digests(RecoveryRequest(config=config, output=storage.url), storage).items():
        stored = {"digest": digest, "loss_before": 2.5, "loss_after": 2.25, "steps": 6, "keep_sha256": ""}
        storage.put(keys.recovered(name), json.dumps(stored).encode())
    progress = ProgressReporter(Console(file=io.StringIO(), width=200))
    assert run_recovery(RecoveryRequest(config=config, output=storage.url), progress) == 0
    told = progress.console.file.getvalue()
    assert "2 of 2 tuned" in told
    assert "2.250" in told
