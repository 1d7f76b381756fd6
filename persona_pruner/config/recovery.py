"""Settings of the tuning after the mask (jobs/recover.py). None of them can change a mask."""

from typing import Literal

from persona_pruner.config.section import Count, Positive, Section


class RecoveryConfig(Section):
    rank: Count = 8
    """Rank of the LoRA matrices, on every linear of the pruned model but the head."""
    alpha: Positive = 16.0
    """Their product is scaled by alpha / rank."""
    steps: Count = 60
    """Steps for one persona; an epoch has as many as its rows fill."""
    rows_per_step: Count = 16
    """Rows (question and answer) of one step."""
    learning_rate: Positive = 0.001
    """AdamW; goes down to 0 linearly."""
    objective: Literal["distillation", "cross_entropy"] = "distillation"
    """distillation: KL(unpruned || tuned) on answer tokens; cross_entropy: of the answers' own tokens, as published."""
    evaluate_every: Count = 10
    """Steps between held-out losses. What is stored is the state with the lowest, the pruned model as it was included;
    without held-out rows it is the last one."""
    seed: int = 0
    """Draws the first LoRA matrices and the batches."""
    form: Literal["adapter", "merged"] = "adapter"
    """What is stored: an adapter for the checkpoint that `export` writes, or a checkpoint with it merged in."""
    checkpoint_steps: Count = 20
    """Checkpoint after so many steps."""
