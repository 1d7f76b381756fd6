"""A worker that scores and answers with the backbone that it trains with: no GPU waits for one half of the work."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import ray
import torch

from persona_pruner.config.schema import RunConfig
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.scheduling.training_worker import TrainingWorker, training_pool
from persona_pruner.storage.base import ObjectInfo, Storage
from persona_pruner.synthesis.answering import SynthesisResult
from persona_pruner.synthesis.pipeline import Answering, Inputs
from persona_pruner.synthesis.rewrite.original import OriginalAnswers
from persona_pruner.synthesis.scoring_worker import ScoringWorker
from persona_pruner.synthesis.selection import score_and_select


class SharedWorker(TrainingWorker):
    """`inputs` is a list with Ray's reference to Inputs: an argument that is one is fetched for every actor anew."""

    def __init__(self, config: RunConfig, output: str, run_id: str, inputs: list[Any]) -> None:
        super().__init__(config, output, run_id)
        self._inputs: Inputs = ray.get(inputs[0])

    def start(self, rank: int, size: int, address: str) -> dict[str, Any]:
        """As TrainingWorker.start."""
        facts = super().start(rank, size, address)
        texts = [question.text for question in self._inputs.question_set]
        self._scorer = ScoringWorker(self.config, texts, self._inputs.references)
        self._scorer.use(self.backbone)
        own = OriginalAnswers() if self.config.synthesis.rewrite.backend == "none" else self._scorer
        self._answering = Answering(self._inputs, own)
        if rank > 0:
            self._answering.storage = cast(Storage, _Discard())
        return facts

    def synthesize(self, personas: Sequence[Persona]) -> tuple[list[SynthesisResult], float]:
        """Score, select, answer and commit a tile: its results, and the seconds that it took.

        All ranks take the same way, and rank 0 writes. Raises UserError.
        """
        began = time.monotonic()
        torch.set_num_threads(self.config.synthesis.actors.cpu_threads)
        selections = list(score_and_select(self.config, self._scorer, self._inputs.question_set, personas))
        results = list(self._answering(selections))
        return results, time.monotonic() - began


class _Discard:
    """Storage of ranks whose results rank 0 stores."""

    def put(self, key: str, data: bytes) -> None:
        return

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(())


def shared_pool(config: RunConfig, output: str, run_id: str, inputs: Inputs) -> GroupPool:
    """A pool of groups that do all the work of a run; none is up yet."""
    return training_pool(config, output, run_id, SharedWorker, [ray.put(inputs)])
