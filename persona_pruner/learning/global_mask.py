"""One mask for all personas together: what a platform would use that does not want one each. A baseline.

Shape suffixes: P personas, L layers, I channels.
"""

import hashlib
from collections.abc import Sequence

import torch

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.dataset import PersonaData
from persona_pruner.learning.batches import TrainingExample
from persona_pruner.learning.encoding import batch, encode
from persona_pruner.learning.init_scores import initial_scores
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.learning.objective import TeacherCache, mask_gradient
from persona_pruner.learning.outcome import StopReason, finish
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.learning.training_free import items_of
from persona_pruner.masks.format import Mask

NAME = "global"


def train_global(trainer: MaskTrainer, data: Sequence[PersonaData], ratio: float, run_id: str) -> Mask | None:
    """STE on the union of all personas' rows, with the steps and rows a step of one persona.

    Starts from the mean of the personas' initial scores. Every rank calls it; the mask comes back on rank 0.
    Raises PersonaError where a persona's rows cannot be used.
    """
    config, learning = trainer.config, trainer.learning
    encoded = [encode(trainer.backbone.tokenizer, config.prompt, d, learning.max_row_tokens) for d in data]
    sha256 = hashlib.sha256("".join(each.sha256 for each in encoded).encode()).hexdigest()
    union = [(p, n) for p, each in enumerate(encoded) for n in range(len(each.train))]
    with BackboneRunner(trainer.backbone) as runner:
        targets = TeacherCache(learning.objective.top_logits) if learning.objective.distillation else None
        if targets is not None:
            for each in encoded:
                targets.collect(runner, [each.prefix], items_of(each), trainer.settings)
        starts = [initial_scores(runner, each, "activation", None, trainer.settings) for each in encoded]
        mean_LI = torch.stack(starts).mean(0)
        trial = MaskCandidate(learning, NAME, mean_LI, runner.masks.channels, ratio, learning.learning_rate)
        for step in range(learning.steps):
            rows = [union[i] for i in batch(len(union), learning.rows_per_step, step, learning.seed, sha256)]
            present = sorted({p for p, _ in rows})
            tokens = sum(encoded[p].train[n].answer for p, n in rows)
            items = [
                TrainingExample(present.index(p), (encoded[p].persona_id, n), encoded[p].train[n], 1 / tokens)
                for p, n in rows
            ]
            mask_LI, leaf_LI = trial.training_mask()
            masks_PLI = mask_LI.detach().expand(len(present), -1, -1)
            prefixes = [encoded[p].prefix for p in present]
            grad_PLI, _ = mask_gradient(runner, masks_PLI, prefixes, items, trainer.settings, targets)
            grad_LI = trainer.backbone.all_reduce(grad_PLI.sum(0))
            trial.update(torch.autograd.grad(mask_LI, leaf_LI, grad_LI)[0])
    whole = PersonaData(NAME, "", (), (), sha256)
    return finish(trainer.backbone, learning, whole, trial, None, StopReason.STEPS, run_id).mask
