"""Settings of the learning of one mask."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from persona_pruner.config.section import (
    Count,
    Fraction,
    Hashed,
    HashedContent,
    HashedWhere,
    NonNegative,
    Positive,
    Section,
)

POOLED_INITS = ("zeros", "magnitude", "activation", "fisher")
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
LEARNED = ("ste", "gumbel", "soft_topk")
WEIGHT_LEVEL = ("wanda", "sparsegpt", "contrastive_wanda", "contrastive_sparse")
Method = Literal[
    "ste", "gumbel", "soft_topk",
    "activation", "fisher", "magnitude", "random", "contrastive",
    "wanda", "sparsegpt", "contrastive_wanda", "contrastive_sparse",
]  # fmt: skip


class ObjectiveConfig(Section):
    cross_entropy: Hashed[NonNegative] = 0.0
    """Weight of the cross-entropy on answer tokens (the paper's objective is this one at 1)."""
    distillation: Hashed[NonNegative] = 1.0
    """Weight of KL(unpruned || masked) on answer tokens, under the same persona."""
    persona_tokens: Annotated[NonNegative, HashedWhere(lambda objective: objective.persona_tokens > 0)] = 0.0
    """How much more the tokens weigh that the description decides: each by 1 + this * (what it changes about the
    token's log-probability under the unpruned model / its mean over the rows). 0 weighs all tokens alike."""
    generic: Annotated[Share, HashedWhere(lambda objective: objective.generic > 0)] = 0.0
    """Share of the loss, and of a step's rows, that is generic text behind a prompt without a persona: keeps general
    language from being pruned away."""
    foreign: Annotated[Share, HashedWhere(lambda objective: objective.foreign > 0)] = 0.0
    """Share of the rows that is generic text behind the persona's own prompt: what it would not say itself, so that the
    mask holds for more than its own words. Distillation alone has a use for it."""
    generic_rows: HashedContent[str | None] = None
    """JSON Lines of question and answer (or instruction and output) for `generic` and `foreign`, from which the
    comparison's baseline is made too; null takes the shipped example's instructions."""
    top_logits: Hashed[Count | None] = None
    """Keep only this many of the unpruned model's logits per token (the rest as one bucket); null keeps
    all."""
    head_tokens: Annotated[Count | None, HashedWhere(lambda objective: objective.head_tokens is not None)] = None
    """Distil over part of the vocabulary: this many tokens drawn once, and the unpruned model's 16 likeliest at each
    position. Nearly halves a step where vocabulary / hidden size is large (SmolLM2: 1024); null compares all tokens."""
    logits_chunk: Hashed[Count] = 1024
    """Answer positions whose logits exist at once (memory: chunk x vocabulary)."""

    @model_validator(mode="after")
    def _some(self) -> "ObjectiveConfig":
        if self.cross_entropy == 0 and self.distillation == 0:
            raise ValueError("cross_entropy and distillation are both 0; one must be above 0")
        if self.foreign and (self.distillation == 0 or self.cross_entropy > 0):
            raise ValueError(
                f"foreign = {self.foreign} goes with distillation alone, since it is not the persona that speaks: set "
                "cross_entropy to 0"
            )
        if self.head_tokens is not None and (self.top_logits is not None or self.cross_entropy > 0):
            raise ValueError(
                f"head_tokens = {self.head_tokens} goes with distillation alone: set top_logits to null and "
                "cross_entropy to 0"
            )
        return self


class StoppersConfig(Section):
    plateau_evaluations: Hashed[Count | None] = None
    """Stop when the held-out loss has not got better by `plateau_delta` for this many evaluations; null is off."""
    plateau_delta: Hashed[NonNegative] = 0.001
    """Nats per token."""
    stability: Hashed[NonNegative | None] = None
    """Stop when the share of mask bits that changed between two evaluations is at most this; null is off."""
    seconds: Hashed[Positive | None] = None
    """Stop a trial after this much training time; null is off. Wall time makes the mask depend on the machine."""

    @property
    def need_evaluations(self) -> bool:
        return self.plateau_evaluations is not None or self.stability is not None


class HalvingConfig(Section):
    learning_rates: Hashed[tuple[Positive, ...]] = ()
    """Grid for successive halving; empty is off. Combined with `ratios` and `inits`."""
    ratios: Hashed[tuple[Fraction, ...]] = ()
    inits: Hashed[tuple[str, ...]] = ()
    rung_steps: Hashed[Count] = 20
    """Steps of the first rung; each next one doubles them and keeps the better half."""


class LearningConfig(Section):
    ratio: Hashed[Fraction | Literal["auto"]] = 0.5
    """Share of FFN channels that is pruned; `auto` takes the largest of `ratio_ladder` within `ratio_tolerance`."""
    ratio_ladder: Hashed[tuple[Fraction, ...]] = (0.25, 0.375, 0.5, 0.625, 0.75)
    """Ratios that `auto` tries, from the smallest."""
    ratio_tolerance: Hashed[NonNegative] = 0.05
    """Held-out loss (nats per token) that `auto` may lose against the unpruned backbone."""
    budget: Hashed[Literal["uniform", "free", "profile"]] = "uniform"
    """How the kept channels are shared among the layers. uniform: the same number in each. free: as many as one top-k
    over all layers leaves them, by what their channels are worth (Fisher), at least `channel_multiple`. profile: the
    same of the pooled mask, rounded to multiples of `channel_multiple`: one profile for all personas."""
    channel_multiple: Hashed[Count] = 64
    """Kept channels per layer are a multiple of this (64 suits tensor cores)."""
    method: Hashed[Method] = "ste"
    """How a mask is made. ste, gumbel and soft_topk learn it; they differ in how the gradient passes the mask. All
    others take one pass over the persona's rows: activation, fisher, magnitude, random and contrastive choose FFN
    channels, wanda, sparsegpt, contrastive_wanda and contrastive_sparse single weights, which `export` and `serve`
    refuse. contrastive*: against the persona that the manifest names as `opposite`. Of the settings below, one pass
    reads ratio, budget and channel_multiple (for channels) and seed."""
    gate: Hashed[Share] = 0.0
    """Methods that choose single weights: what a dropped weight is multiplied by; 0 takes it out."""
    temperature: Hashed[Positive] = 1.0
    """gumbel, soft_topk: temperature of the relaxation."""
    objective: ObjectiveConfig = ObjectiveConfig()
    init: Hashed[str] = "activation"
    """First scores: zeros, magnitude, activation, fisher (squared gradients of the mask, on up to 96 rows),
    `persona:<id>` (scores of a committed mask), `mean:<id>,<id>`, or pooled (one mask that the run first learns from
    the rows of `pooled_personas`)."""
    optimizer: Hashed[Literal["adam", "value"]] = "adam"
    """adam: scores are ranks, one second moment per layer. value: scores are what a channel is worth (nats per token,
    from Fisher) and follow the gradients slowly; without learning_rate, schedule and grad_clip, and with `budget: free`
    the layers share their channels anew in every step. Better on real language models."""
    value_gradient: Annotated[NonNegative, HashedWhere(lambda learning: learning.optimizer == "value")] = 0.1
    """value: weight of a step's gradient against what Fisher has foretold."""
    learning_rate: Hashed[Positive] = 0.02
    """adam: rate of the scores; they start as ranks in (0, 1)."""
    schedule: Hashed[Literal["constant", "linear", "cosine"]] = "constant"
    """Rate over the steps; linear and cosine go down to 0."""
    average: Hashed[Annotated[float, Field(ge=0, le=1)]] = 0.5
    """Share of the steps, counted from the end, over which the scores are averaged for the mask; 0 takes the last."""
    core: Hashed[Share] = 0.0
    """Share of a mask's kept channels that is the pooled mask's best and the same for all personas; only the rest is
    personal. 0 is off."""
    pooled_personas: Annotated[Count, HashedWhere(lambda learning: learning.needs_pooled_mask)] = 16
    """Personas, drawn from the manifest by the hash of their id, whose rows the pooled mask is learned from."""
    pooled_init: Annotated[str, HashedWhere(lambda learning: learning.needs_pooled_mask)] = "fisher"
    """First scores of the pooled mask: zeros, magnitude, activation or fisher."""
    pooled_steps: Annotated[Count, HashedWhere(lambda learning: learning.needs_pooled_mask)] = 100
    """Steps of the pooled mask."""
    steps: Hashed[Count] = 100
    """Step budget of one persona."""
    passes: Hashed[Positive | None] = None
    """Steps as passes over a persona's rows, in place of `steps`; null takes `steps`."""
    rows_per_step: Hashed[Count] = 16
    """Rows (question and answer) of one persona in one step, over all shards."""
    max_row_tokens: Count = 2048
    """A longer row makes the persona's data bad (errors/<id>.json, cause row_too_long)."""
    grad_clip: Hashed[Positive] = 1.0
    """Norm to which a persona's gradient is clipped."""
    seed: Hashed[int] = 0
    """Draws batches, Gumbel noise, random masks."""
    personas_per_step: Hashed[Count] = 1
    """Personas that share one step of a group; 1 is the bit-identical mode."""
    micro_batch_tokens: Hashed[Count] = 16384
    """Tokens (padding included) of a step that run at once on a shard; lower it where memory is short."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    evaluate_every: Annotated[Count, HashedWhere(lambda learning: learning.stoppers.need_evaluations)] = 50
    """Steps between held-out evaluations (stoppers look at those)."""
    keep_scores: bool = False
    """Store the scores in the mask (float16), for warm starts."""
    stoppers: StoppersConfig = StoppersConfig()
    halving: HalvingConfig = HalvingConfig()

    @property
    def is_learned(self) -> bool:
        """Whether masks are trained; else they are made in one pass."""
        return self.method in LEARNED

    @property
    def is_weight_level(self) -> bool:
        return self.method in WEIGHT_LEVEL

    @property
    def is_contrastive(self) -> bool:
        return self.method.startswith("contrastive")

    @property
    def needs_pooled_mask(self) -> bool:
        return self.is_learned and (self.init == "pooled" or self.core > 0 or self.budget == "profile")

    @property
    def generic_rows_per_step(self) -> int:
        """Rows of generic text in a step, of its `rows_per_step`."""
        share = self.objective.generic
        return min(max(round(share * self.rows_per_step), 1), self.rows_per_step - 1) if share else 0

    def steps_for(self, rows: int) -> int:
        """The step budget of a persona with so many rows to train on."""
        if self.passes is None:
            return self.steps
        return max(math.ceil(self.passes * rows / min(rows, self.rows_per_step - self.generic_rows_per_step)), 1)

    @model_validator(mode="after")
    def _consistent(self) -> "LearningConfig":
        several = self.ratio == "auto" or self.halving.ratios
        if several and (self.budget != "uniform" or self.needs_pooled_mask):
            reason = f"budget = {self.budget}" if self.budget != "uniform" else "a pooled mask (init, core)"
            raise ValueError(f"{reason} needs one fixed ratio, not auto or halving.ratios")
        values = self.optimizer == "value" and self.is_learned
        if values and (self.method != "ste" or self.init not in ("fisher", "pooled")):
            raise ValueError(
                f"optimizer = value needs method = ste and init = fisher or pooled, not {self.method} and {self.init}"
            )
        if self.objective.generic and self.rows_per_step == 1:
            raise ValueError(f"objective.generic = {self.objective.generic} needs rows_per_step above 1")
        if self.core > 0 and self.method == "soft_topk":
            raise ValueError(f"core = {self.core} needs the method ste or gumbel")
        if self.pooled_init not in POOLED_INITS:
            raise ValueError(f"pooled_init = {self.pooled_init!r}; choose from {', '.join(POOLED_INITS)}")
        if not self.is_learned and self.ratio == "auto":
            raise ValueError(f"method = {self.method} makes a mask in one pass and needs a fixed ratio, not auto")
        return self
