"""One typed tree of all settings of a run, with the rules that hold between them."""

import datetime
import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_SYSTEM = (
    "You are roleplaying as a user with this persona: {persona}\nAnswer the question, roleplay as the given persona."
)
DEFAULT_REWRITE = (
    "Answer the question in the first person, in the voice of the persona. Let its background, values and manner "
    "of speaking decide what you say. Reply with the answer alone.\n\nQuestion: {question}"
)
DEFAULT_REWRITE_WITH_REFERENCE = (
    "Rewrite the reference answer as the persona would give it: same facts, but its background, values and manner "
    "of speaking. Reply with the answer alone.\n\nQuestion: {question}\n\nReference answer: {answer}"
)

DEFAULT_DATE = datetime.date(2024, 7, 26)

Fraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class BackboneConfig(Section):
    path: str = ""
    """The frozen model: a local directory, an s3:// prefix or a Hugging Face name. Required. A relative path counts
    from the directory of the configuration file."""
    revision: str | None = None
    """Revision of a Hugging Face name."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which the weights are held and run."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off: a model never executes anything."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "grouped"] = "sdpa"
    """Attention kernel of transformers; `grouped` is ours, faster on a CPU where query heads share key-value heads."""


class PromptConfig(Section):
    system: str = DEFAULT_SYSTEM
    """System message of every prompt; must contain {persona}."""
    rewrite: str = DEFAULT_REWRITE
    """User message for a rewriting LLM (openai, vllm); must contain {question}. The backend `self` sends the bare
    question, so that its samples are the backbone's own distribution."""
    rewrite_with_reference: str = DEFAULT_REWRITE_WITH_REFERENCE
    """The same where `synthesis.rewrite.with_original` is on; must contain {question} and {answer}."""
    date: datetime.date = DEFAULT_DATE
    """What a chat template that inserts today's date sees as today, so that prompts are the same on every day."""

    @model_validator(mode="after")
    def _placeholders(self) -> "PromptConfig":
        for name, needed in (
            ("system", ("{persona}",)),
            ("rewrite", ("{question}",)),
            ("rewrite_with_reference", ("{question}", "{answer}")),
        ):
            missing = [p for p in needed if p not in getattr(self, name)]
            if missing:
                raise ValueError(f"prompt.{name} must contain {' and '.join(missing)}")
        return self


class SourceConfig(Section):
    path: str
    """Instruction data: .jsonl, .jsonl.gz, .json, .csv, .parquet, a directory of those, s3://..., or a hub name."""
    split: str = "train"
    """Split of a hub data set."""
    question: str = "instruction"
    """Column with the question."""
    input: str | None = "input"
    """Column whose text, where not empty, follows the question after a line break; may be absent."""
    answer: str | None = "output"
    """Column with the original answer; null where there is none."""
    weight: Positive = 1.0
    """Share of this source in the pool when `synthesis.max_questions` cuts it, relative to the others."""


class ReferenceConfig(Section):
    path: str | None = None
    """Manifest-like file of reference personas; null draws them from the manifest."""
    count: Count = 9
    """References per target (r in the formula), never the target itself."""


class SelectConfig(Section):
    method: Literal["top_k", "threshold", "quantile", "random"] = "top_k"
    """How questions are chosen by sensitivity. `random` ignores it (the ablation)."""
    k: Count = 128
    """top_k, random: this many questions; the other methods take at most this many."""
    threshold: NonNegative = 0.1
    """threshold: questions whose sensitivity is above this."""
    quantile: Fraction = 0.9
    """quantile: questions above this quantile of the persona's scores."""
    diversity: Annotated[float, Field(ge=0, le=1)] | None = None
    """Skip a question whose word overlap (Jaccard) with one already taken is above this; null is off."""


class RewriteConfig(Section):
    backend: Literal["self", "openai", "vllm"] = "self"
    """Who answers: the backbone itself, an OpenAI-compatible endpoint, or vLLM through ray.data.llm."""
    with_original: bool = False
    """Show the original answer to the rewriting LLM (openai, vllm)."""
    samples_per_question: Count = 1
    """Answers drawn for each selected question."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 1 samples the model's own distribution, 0 is greedy."""
    max_new_tokens: Count = 160
    """An answer that does not end within this is dropped as cut off."""
    batch_size: Count = 32
    """self: rows generated together. Part of what decides the samples."""
    model: str | None = None
    """openai, vllm: the model's name at the endpoint, or its path."""
    base_url: str | None = None
    """openai: the endpoint, e.g. http://host:8000/v1. The key comes from OPENAI_API_KEY."""
    concurrency: Count = 16
    """openai: requests under way at once, per rewriting actor."""
    requests_per_minute: Count | None = None
    """openai: upper limit per rewriting actor; null is none."""
    timeout_seconds: Positive = 60.0
    """openai: one request, from sending to the last byte."""
    deadline_seconds: Positive = 600.0
    """openai: all tries for one answer together."""
    token_budget: Count | None = None
    """openai: stop cleanly once about this many tokens (in and out) were paid for in this run; null is none."""


class FilterConfig(Section):
    min_words: Count = 2
    """Answers with fewer words count as empty."""
    echo_overlap: Fraction = 0.95
    """An answer is an echo when this share of its words (in order) stands in the original answer or question."""
    min_answers: Count = 8
    """Fewer usable answers than this is an error of that persona."""


class ActorsConfig(Section):
    min: Count = 1
    """Backbones in the Ray Data pipeline, at least."""
    max: Count = 1
    """... and at most."""
    shards: Count = 1
    """Actors that hold one backbone together, 1/shards each (DeepSpeed ZeRO-3)."""
    num_cpus: Positive = 1.0
    """Ray CPUs per actor (fractions allowed)."""
    num_gpus: NonNegative = 0.0
    """Ray GPUs per actor (fractions allowed)."""
    cpu_threads: Count = 1
    """Threads of one actor's arithmetic; part of what makes scores reproducible."""

    @model_validator(mode="after")
    def _ordered(self) -> "ActorsConfig":
        if self.max < self.min:
            raise ValueError(f"max = {self.max} is below min = {self.min}")
        return self


class SynthesisConfig(Section):
    sources: tuple[SourceConfig, ...] = ()
    """Where questions come from. At least one."""
    max_questions: Count | None = None
    """Size of the pool after mixing and deduplication; null takes all."""
    seed: int = 0
    """Draws references, the pool's cut, and samples."""
    references: ReferenceConfig = ReferenceConfig()
    layers: tuple[int, int] | None = None
    """First and last block (from 0, inclusive) whose hidden states enter the sensitivity; null is all."""
    select: SelectConfig = SelectConfig()
    rewrite: RewriteConfig = RewriteConfig()
    filter: FilterConfig = FilterConfig()
    heldout_fraction: Fraction = 0.25
    """Share of questions (by hash) never trained on, for the held-out loss."""
    tile_personas: Count = 32
    """Personas of a tile."""
    tile_questions: Count = 64
    """Questions run together in a tile."""
    max_prompt_tokens: Count = 2048
    """A question whose prompt is longer is left out and counted. References may take half of it."""
    actors: ActorsConfig = ActorsConfig()


class ObjectiveConfig(Section):
    cross_entropy: NonNegative = 0.0
    """Weight of the cross-entropy on answer tokens (the paper's objective is this one at 1)."""
    distillation: NonNegative = 1.0
    """Weight of KL(unpruned || masked) on answer tokens, under the same persona."""
    top_logits: Count | None = None
    """Keep only this many of the unpruned model's logits a token as targets (the rest as one bucket); null keeps
    all."""
    logits_chunk: Count = 1024
    """Answer positions whose logits exist at once (memory: chunk x vocabulary)."""

    @model_validator(mode="after")
    def _some(self) -> "ObjectiveConfig":
        if self.cross_entropy == 0 and self.distillation == 0:
            raise ValueError("cross_entropy and distillation are both 0; one must be above 0")
        return self


class StoppersConfig(Section):
    plateau_evaluations: Count | None = None
    """Stop when the held-out loss has not got better by `plateau_delta` for this many evaluations; null is off."""
    plateau_delta: NonNegative = 0.001
    """Nats per token."""
    stability: NonNegative | None = None
    """Stop when the share of mask bits that changed between two evaluations is at most this; null is off."""
    seconds: Positive | None = None
    """Stop a trial after this much training time; null is off. Wall time makes the mask depend on the machine."""


class HalvingConfig(Section):
    learning_rates: tuple[Positive, ...] = ()
    """Grid for successive halving; empty is off. Combined with `ratios` and `inits`."""
    ratios: tuple[Fraction, ...] = ()
    inits: tuple[str, ...] = ()
    rung_steps: Count = 20
    """Steps of the first rung; each next one doubles them and keeps the better half."""


class LearningConfig(Section):
    ratio: Fraction | Literal["auto"] = 0.5
    """Share of FFN channels that is pruned; `auto` takes the largest of `ratio_ladder` within `ratio_tolerance`."""
    ratio_ladder: tuple[Fraction, ...] = (0.25, 0.375, 0.5, 0.625, 0.75)
    """Ratios that `auto` tries, from the smallest."""
    ratio_tolerance: NonNegative = 0.05
    """Held-out loss (nats per token) that `auto` may lose against the unpruned backbone."""
    channel_multiple: Count = 64
    """Kept channels per layer are a multiple of this (64 suits tensor cores)."""
    estimator: Literal["ste", "gumbel", "soft_topk"] = "ste"
    """How the gradient passes the mask."""
    temperature: Positive = 1.0
    """gumbel, soft_topk: temperature of the relaxation."""
    objective: ObjectiveConfig = ObjectiveConfig()
    init: str = "activation"
    """First scores: zeros, magnitude, activation, `persona:<id>` (scores of a committed mask), or `mean:<id>,<id>`."""
    learning_rate: Positive = 0.02
    """Rate of the scores; they start as ranks in (0, 1)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Rate over the steps; linear and cosine go down to 0."""
    average: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the steps, counted from the end, over which the scores are averaged for the mask; 0 takes the last."""
    steps: Count = 100
    """Step budget of one persona."""
    rows_per_step: Count = 16
    """Rows (question and answer) of one persona in one step, over all shards."""
    max_row_tokens: Count = 2048
    """A longer row makes the persona's data bad (errors/<id>.json, cause row_too_long)."""
    grad_clip: Positive = 1.0
    """Norm to which a persona's gradient is clipped."""
    seed: int = 0
    """Draws batches, Gumbel noise, random masks."""
    personas_per_step: Count = 1
    """Personas that share one step of a group; 1 is the bit-identical mode."""
    micro_batch_tokens: Count = 16384
    """Tokens (padding included) of a step that run at once on a shard; lower it where memory is short."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    evaluate_every: Count = 50
    """Steps between held-out evaluations (stoppers look at those)."""
    keep_scores: bool = False
    """Store the scores in the mask (float16), for warm starts."""
    stoppers: StoppersConfig = StoppersConfig()
    halving: HalvingConfig = HalvingConfig()


class GroupsConfig(Section):
    min: Count = 1
    """Shard groups kept while there is work."""
    max: Count = 1
    """Shard groups at most; more are asked for while personas wait."""
    shards: Count = 1
    """Actors of a group; each holds 1/shards of the backbone (DeepSpeed ZeRO-3)."""
    num_cpus: Positive = 1.0
    """Ray CPUs per actor."""
    num_gpus: NonNegative = 0.0
    """Ray GPUs per actor."""
    cpu_threads: Count = 1
    """Threads of one actor's arithmetic; part of what makes masks reproducible."""
    idle_seconds: Positive = 30.0
    """A group beyond `min` without work for this long is given back."""
    timeout_seconds: Positive = 600.0
    """A collective or the set-up of a group that takes longer counts as a lost group."""

    @model_validator(mode="after")
    def _ordered(self) -> "GroupsConfig":
        if self.max < self.min:
            raise ValueError(f"max = {self.max} is below min = {self.min}")
        return self


class SchedulerConfig(Section):
    max_concurrent: Count | None = None
    """Personas in training at once; null is as many as the groups take."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Failures of a persona's own making (not of a lost node) before it goes to errors/."""
    backoff_seconds: NonNegative = 1.0
    """Wait before the first retry; doubles each time."""
    checkpoint_steps: Count = 50
    """Checkpoint after this many steps ..."""
    checkpoint_seconds: Positive = 30.0
    """... or this many seconds, whichever comes first."""
    time_budget_seconds: Positive | None = None
    """Checkpoint and leave after this long (exit status 75); null is no limit."""
    lease_seconds: Positive = 30.0
    """A job that has not renewed its claim on the output for this long can be replaced by another."""


class EvaluationConfig(Section):
    enabled: bool = False
    """Compare each mask with the baselines at the end (the quickstart's table)."""
    conversations: str | None = None
    """JSON Lines of persona_id, question, answer: text of the personas that the backbone did not write."""
    max_rows: Count = 64
    """Rows per persona and kind of text."""
    questions: str | None = None
    """Directory of <persona_id>.json or <persona_id>.txt files: questions never used to make that persona's data."""


class StorageConfig(Section):
    deadline_seconds: Positive = 60.0
    """All tries of one storage call together."""
    connections: Count = 16
    """Connections to the object storage at once, per process."""
    server_side_encryption: Literal["AES256", "aws:kms"] | None = None
    """Passed through with every object that is put."""
    kms_key_id: str | None = None
    """Key for aws:kms."""


class RunConfig(Section):
    """Every setting of a run."""

    backbone: BackboneConfig = BackboneConfig()
    prompt: PromptConfig = PromptConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    learning: LearningConfig = LearningConfig()
    groups: GroupsConfig = GroupsConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    storage: StorageConfig = StorageConfig()

    def digest(self) -> str:
        """sha256 over what decides the masks; places, resources, scheduling and storage do not."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """The settings behind `digest`. Contents of the backbone and of sources have fingerprints of their own."""
        tree = self.model_dump(mode="json", exclude={"scheduler", "evaluation", "storage"})
        del tree["backbone"]["path"]
        del tree["synthesis"]["references"]["path"]
        for source in tree["synthesis"]["sources"]:
            del source["path"]
        for key in (
            "base_url",
            "concurrency",
            "requests_per_minute",
            "timeout_seconds",
            "deadline_seconds",
            "token_budget",
        ):
            del tree["synthesis"]["rewrite"][key]
        tree["groups"] = {"shards": self.groups.shards, "cpu_threads": self.groups.cpu_threads}
        tree["synthesis"]["actors"] = {
            "shards": self.synthesis.actors.shards,
            "cpu_threads": self.synthesis.actors.cpu_threads,
        }
        return tree
