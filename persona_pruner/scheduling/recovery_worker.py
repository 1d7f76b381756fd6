"""Tunes pruned models in a Ray actor, one persona at a time, and stores what comes of it."""

import hashlib
import json
from typing import Any

import ray

from persona_pruner import activity
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import read_persona_data, uses_unfinished_answers
from persona_pruner.errors import MaskError, PersonaError, StorageError
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.recovery import Recovered, recover, recovery_digest
from persona_pruner.manifest import Persona
from persona_pruner.masks.format import Mask
from persona_pruner.masks.store import MaskStore
from persona_pruner.scheduling.activity_channel import forward_activity
from persona_pruner.scheduling.actor_group import ActorGroup
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage
from persona_pruner.storage.open import open_storage


class RecoveryWorker:
    """Holds the whole backbone: a pruned copy of it is tuned for each persona."""

    backbone: Backbone

    def __init__(self, config: RunConfig, output: str) -> None:
        self.config = config
        self.storage = open_storage(output, config.storage)
        self._masks = MaskStore(output, config.storage)
        forward_activity()

    def address(self) -> str:
        return ""

    def start(self, rank: int, size: int, address: str) -> None:
        activity.begin(activity.LOADING)
        self.backbone = load_backbone(self.config.backbone, deepspeed=False)
        activity.begin("")

    def recover(self, persona_id: str) -> str | None:
        """Tune one persona and store the result, its last object last; returns what is wrong, if it cannot be done."""
        try:
            mask = self._masks.load_channels(persona_id)
            persona = Persona(persona_id, mask.metadata.persona_description)
            unfinished = uses_unfinished_answers(self.config)
            data = read_persona_data(self.storage, persona, unfinished=unfinished)
            digest = digest_of_mask(self.config, mask.packed(), mask.metadata.data_sha256)
            callbacks = _Checkpoints(self.storage)
            done = recover(self.backbone, self.config, mask, data, digest, callbacks)
            assert done is not None, "nobody stops it"
            store(self.storage, self.config, done, digest, mask)
        except (PersonaError, MaskError, StorageError) as error:
            return str(error)
        return None


def digest_of_mask(config: RunConfig, packed: bytes, data_sha256: str) -> str:
    """What decides the result for a mask of these packed bits and data."""
    return recovery_digest(config.recovery, hashlib.sha256(packed).hexdigest(), data_sha256)


def store(storage: Storage, config: RunConfig, done: Recovered, digest: str, mask: Mask) -> None:
    """Files first: whoever sees the result sees all of them."""
    for name, data in done.files.items():
        storage.put(keys.recovery_file(done.persona_id, name), data)
    result: dict[str, Any] = {
        "persona_id": done.persona_id,
        "digest": digest,
        "keep_sha256": hashlib.sha256(mask.packed()).hexdigest(),
        "form": config.recovery.form,
        "steps": done.steps,
        "loss_before": done.loss_before,
        "loss_after": done.loss_after,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in done.files.items()},
    }
    storage.put(keys.recovered(done.persona_id), json.dumps(result, indent=1).encode())
    storage.delete(keys.recovery_checkpoint(done.persona_id))


class _Checkpoints(TrainingCallbacks):
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read_checkpoint(self, persona_id: str) -> bytes | None:
        try:
            return self.storage.get(keys.recovery_checkpoint(persona_id))
        except NotFoundError:
            return None

    def write_checkpoint(self, persona_id: str, data: bytes) -> None:
        self.storage.put(keys.recovery_checkpoint(persona_id), data)


RemoteRecoveryWorker: Any = ray.remote(max_restarts=0)(RecoveryWorker)


def recovery_pool(config: RunConfig, output: str) -> GroupPool:
    """A pool of single RecoveryWorkers; none is up yet."""
    settings = config.group_pool
    return GroupPool(settings, lambda: ActorGroup(settings, RemoteRecoveryWorker, (config, output)))
