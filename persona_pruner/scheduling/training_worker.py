"""One shard of the backbone in a Ray actor, and what its group does with it: train, commit, evaluate."""

import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import ray
import torch

from persona_pruner import activity
from persona_pruner.backbone.load import World, free_port, load_backbone
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, read_persona_data, uses_unfinished_answers
from persona_pruner.errors import MaskError, PersonaError, StorageError
from persona_pruner.evaluation import table
from persona_pruner.evaluation.asking import answer_task
from persona_pruner.evaluation.baselines import Baselines
from persona_pruner.evaluation.subject import AnswerTask
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.methods.one_pass import OnePass
from persona_pruner.learning.outcome import LearnedScores, Progress, TrainingResult, TrainingStatus
from persona_pruner.learning.pooled import global_config, pooled_config, train_pooled
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.manifest import Persona
from persona_pruner.masks.format import Mask
from persona_pruner.masks.weight_mask import WeightMask, read_mask
from persona_pruner.scheduling.activity_channel import forward_activity
from persona_pruner.scheduling.actor_group import ActorGroup
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage
from persona_pruner.storage.open import open_storage


class TrainingWorker:
    """One shard of the backbone, and the work of its group. `control` methods answer while it trains."""

    def __init__(self, config: RunConfig, output: str, run_id: str) -> None:
        self.config, self.run_id = config, run_id
        self.storage = open_storage(output, config.storage)
        self._stop = threading.Event()
        self._progress: dict[str, Progress] = {}
        self._fetched: dict[str, PersonaData] = {}
        forward_activity()

    def address(self) -> str:
        """host:port at which rank 0 will listen."""
        return f"{ray.util.get_node_ip_address()}:{free_port('')}"

    def start(self, rank: int, size: int, address: str) -> dict[str, Any]:
        """Load this rank's shard. Returns its pid, node and device."""
        groups = self.config.groups
        activity.begin(activity.LOADING)
        torch.set_num_threads(groups.cpu_threads)
        self.backbone = load_backbone(self.config.backbone, World(rank, size, address, groups.timeout_seconds))
        trains = self.config.learning.is_learned
        self.trainer = MaskTrainer(self.backbone, self.config) if trains else OnePass(self.backbone, self.config)
        activity.begin("")
        return {"pid": os.getpid(), "node": socket.gethostname(), "device": str(self.backbone.device)}

    def train(self, personas: Sequence[Persona]) -> list[TrainingResult]:
        """Train personas together and commit their masks. One result for each, in order, without mask and curve."""
        began = time.monotonic()
        results = self._results(personas)
        busy = (time.monotonic() - began) / len(personas)
        return [dataclasses.replace(result, busy_seconds=busy) for result in results]

    def _results(self, personas: Sequence[Persona]) -> list[TrainingResult]:
        results: dict[str, TrainingResult] = {}
        data: list[PersonaData] = []
        for persona in personas:
            try:
                fetched = self._fetched.pop(persona.id, None)
                data.append(fetched or self._read(persona))
            except PersonaError as error:
                results[persona.id] = TrainingResult.failed(persona.id, error)
        try:
            results |= self._train(data)
        except StorageError as error:
            if self.config.groups.shards > 1:
                raise  # the other ranks wait for this one: only a new group helps
            failure = PersonaError("storage", str(error))
            return [results.get(p.id) or TrainingResult.failed(p.id, failure) for p in personas]
        return [results[p.id] for p in personas]

    def _train(self, data: Sequence[PersonaData]) -> dict[str, TrainingResult]:
        results: dict[str, TrainingResult] = {}
        for result in self.trainer.train(data, run_id=self.run_id, callbacks=_WorkerCallbacks(self)):
            self._progress.pop(result.persona_id, None)
            if result.curve is not None:
                self.storage.put(keys.curve(result.persona_id), result.curve.to_bytes())
            if result.mask is not None:
                commit_mask(self.storage, result.mask)
            results[result.persona_id] = dataclasses.replace(result, mask=None, curve=None)
        return results

    def train_global(self, request: tuple[Sequence[Persona], float]) -> bytes | None:
        """The one mask for all personas that the evaluation compares with; None on other ranks than 0."""
        personas, ratio = request
        data = [self._read(persona) for persona in personas]
        result = train_pooled(
            self.backbone, global_config(self.config, ratio), data, self.run_id, _GlobalCallbacks(self)
        )
        if result.status is TrainingStatus.FAILED:
            raise PersonaError(result.cause, result.message)
        return None if result.mask is None else result.mask.to_bytes()

    def train_pooled(self, personas: Sequence[Persona]) -> bool:
        """Learn the mask that personas start from, out of the data that there are of `personas`, and store it.

        False where it was stopped before. Raises PersonaError.
        """
        data = []
        for persona in personas:
            with contextlib.suppress(PersonaError):
                data.append(self._read(persona))
        if not data:
            raise PersonaError("no_data", "none of the personas for the pooled mask has data")
        config = pooled_config(self.config)
        result = train_pooled(self.backbone, config, data, self.run_id, _PooledCallbacks(self))
        if result.status is TrainingStatus.FAILED:
            raise PersonaError(result.cause, result.message)
        if result.mask is not None and result.learned is not None:
            self.storage.put(keys.POOLED_SCORES, result.learned.to_bytes())
            self.storage.put_if_absent(keys.POOLED_MASK, result.mask.to_bytes())
            self.storage.delete(keys.POOLED_CHECKPOINT)
        return result.status is TrainingStatus.DONE

    def evaluate(self, task: Any) -> dict[str, dict[str, float]]:
        return table.evaluate_persona(self.backbone, self.config, task, self.baselines.generic_activation)

    @cached_property
    def baselines(self) -> Baselines:
        return Baselines(self.backbone, self.config)

    def answer(self, task: AnswerTask) -> str | None:
        """Ask one persona under every arm and store its answers; what was wrong with it, if it could not be."""
        try:
            answer_task(self.baselines, self.storage, task)
        except (PersonaError, MaskError) as error:
            return str(error)
        return None

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Checkpoint and come back from `train`, now and at every later call."""
        self._stop.set()

    @ray.method(concurrency_group="control")
    def prefetch(self, personas: Sequence[Persona]) -> None:
        """Read the next personas' data while the current one trains; what fails here is told by `train`."""
        for persona in personas:
            with contextlib.suppress(PersonaError, StorageError):
                self._fetched[persona.id] = self._read(persona)

    def _read(self, persona: Persona) -> PersonaData:
        unfinished = uses_unfinished_answers(self.config)
        data = read_persona_data(self.storage, persona, unfinished=unfinished)
        if not self.config.learning.is_contrastive or persona.opposite is None:
            return data
        opposite = read_persona_data(self.storage, persona.opposite, unfinished=unfinished)
        return dataclasses.replace(data, opposite=opposite)

    @ray.method(concurrency_group="control")
    def progress(self) -> list[Progress]:
        return list(self._progress.values())

    def note(self, progress: Progress) -> None:
        self._progress[progress.persona_id] = progress

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()


class _WorkerCallbacks(TrainingCallbacks):
    """Checkpoints and warm starts in the output; progress and stop of the worker."""

    def __init__(self, worker: TrainingWorker) -> None:
        self.worker, self.storage = worker, worker.storage

    def read_checkpoint(self, persona_id: str) -> bytes | None:
        try:
            return self.storage.get(keys.checkpoint(persona_id))
        except NotFoundError:
            return None

    def write_checkpoint(self, persona_id: str, data: bytes) -> None:
        self.storage.put(keys.checkpoint(persona_id), data)

    def warm_scores(self, persona_id: str) -> torch.Tensor | None:
        """For the inits persona:<id> and mean:<id>,<id>: the mean of those masks' scores, for every persona."""
        kind, _, names = self.worker.config.learning.init.partition(":")
        if kind not in ("persona", "mean"):
            return None
        scores = []
        for name in names.split(","):
            key = keys.mask(name.strip())
            mask = Mask.from_bytes(self.storage.get(key), f"{self.storage.url}/{key}")
            if mask.scores_LI is None:
                raise MaskError(f"{self.storage.url}/{key}: holds no scores; make it with learning.keep_scores: true")
            scores.append(mask.scores_LI.float())
        return torch.stack(scores).mean(0)

    def pooled_scores(self) -> LearnedScores | None:
        key = keys.POOLED_SCORES
        try:
            return LearnedScores.from_bytes(self.storage.get(key), f"{self.storage.url}/{key}")
        except NotFoundError:
            return None

    def should_stop(self) -> bool:
        return self.worker.stopping

    def report(self, progress: Progress) -> None:
        self.worker.note(progress)


class _PooledCallbacks(_WorkerCallbacks):
    """For the mask that personas start from."""

    def read_checkpoint(self, persona_id: str) -> bytes | None:
        try:
            return self.storage.get(keys.POOLED_CHECKPOINT)
        except NotFoundError:
            return None

    def write_checkpoint(self, persona_id: str, data: bytes) -> None:
        self.storage.put(keys.POOLED_CHECKPOINT, data)

    def pooled_scores(self) -> LearnedScores | None:
        return None


class _GlobalCallbacks(TrainingCallbacks):
    """For the comparison's one mask: it starts where the personas do, and goes through in one piece."""

    def __init__(self, worker: TrainingWorker) -> None:
        self._inner = _WorkerCallbacks(worker)

    def pooled_scores(self) -> LearnedScores | None:
        return self._inner.pooled_scores()


def training_pool(
    config: RunConfig, output: str, run_id: str, worker: type[TrainingWorker] = TrainingWorker, *more: Any
) -> GroupPool:
    """A pool of groups of workers, which take `more` arguments; none is up yet."""
    remote: Any = ray.remote(concurrency_groups={"control": 2}, max_restarts=0)(worker)  # type: ignore[call-overload]
    settings, arguments = config.group_pool, (config, output, run_id, *more)
    return GroupPool(settings, lambda: ActorGroup(settings, remote, arguments))


def commit_mask(storage: Storage, mask: Mask | WeightMask) -> None:
    """Store a mask, read it back and verify it; then its checkpoint is gone. A stale mask in its place is replaced."""
    key = keys.mask(mask.metadata.persona_id)
    data = mask.to_bytes()
    if not storage.put_if_absent(key, data) and storage.get(key) != data:
        storage.put(key, data)
    stored = storage.get(key)
    if stored != data:
        read_mask(stored, f"{storage.url}/{key}")
        raise MaskError(f"{storage.url}/{key}: holds another mask than the one just written")
    storage.delete(keys.checkpoint(mask.metadata.persona_id))
