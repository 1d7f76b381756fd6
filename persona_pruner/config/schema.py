"""One typed tree of all settings of a run, with the rules that hold between them."""

import datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from persona_pruner.config.evaluation import AnswersConfig, BenchmarksConfig, EvaluationConfig, JudgeConfig
from persona_pruner.config.learning import HalvingConfig, LearningConfig, ObjectiveConfig, StoppersConfig
from persona_pruner.config.recovery import RecoveryConfig
from persona_pruner.config.section import BackbonePool, Count, Hashed, NonNegative, Positive, Section
from persona_pruner.config.synthesis import (
    ActorsConfig,
    EnginesConfig,
    FilterConfig,
    ReferenceConfig,
    RewriteConfig,
    SelectConfig,
    SourceConfig,
    SynthesisConfig,
)

__all__ = [
    "ActorsConfig",
    "AnswersConfig",
    "BackboneConfig",
    "BenchmarksConfig",
    "EnginesConfig",
    "EvaluationConfig",
    "FilterConfig",
    "GroupsConfig",
    "HalvingConfig",
    "JudgeConfig",
    "LearningConfig",
    "ObjectiveConfig",
    "PromptConfig",
    "RecoveryConfig",
    "ReferenceConfig",
    "RewriteConfig",
    "RunConfig",
    "SchedulerConfig",
    "Section",
    "SelectConfig",
    "SourceConfig",
    "StoppersConfig",
    "StorageConfig",
    "SynthesisConfig",
]

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


class BackboneConfig(Section):
    path: str = ""
    """The frozen model: a local directory, an s3:// prefix or a Hugging Face name. Required. A relative path counts
    from the directory of the configuration file."""
    revision: str | None = None
    """Revision of a Hugging Face name."""
    dtype: Hashed[Literal["float32", "bfloat16"]] = "float32"
    """Type in which the weights are held and run. A CPU without instructions for bfloat16 (AVX-512 BF16, AMX) runs it
    at half the speed of float32 and less."""
    trust_remote_code: Hashed[bool] = False
    """Run code that comes with the model. Off: a model never executes anything."""
    attention: Hashed[Literal["sdpa", "eager", "flash_attention_2", "grouped"]] = "sdpa"
    """Attention kernel of transformers; `grouped` is ours, faster on a CPU where query heads share key-value heads."""
    exportable: bool = True
    """Refuse at the start a model whose masks `export` cannot turn into a smaller checkpoint."""


class PromptConfig(Section):
    system: Hashed[str] = DEFAULT_SYSTEM
    """System message of every prompt; must contain {persona}."""
    rewrite: Hashed[str] = DEFAULT_REWRITE
    """User message for a rewriting LLM (openai, vllm); must contain {question}. The backend `self` sends the bare
    question, so that its samples are the backbone's own distribution."""
    rewrite_with_reference: Hashed[str] = DEFAULT_REWRITE_WITH_REFERENCE
    """The same where `synthesis.rewrite.with_original` is on; must contain {question} and {answer}."""
    rewrite_system: Hashed[str | None] = None
    """System message for a rewriting LLM; null takes `prompt.system`, an empty text sends none. All three may contain
    {persona}, {question} and {answer}."""
    date: Hashed[datetime.date] = DEFAULT_DATE
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


class GroupsConfig(BackbonePool):
    min: Count = 1
    """Shard groups kept while there is work."""
    max: Count = 1
    """Shard groups at most; more are asked for while personas wait."""
    idle_seconds: Positive = 30.0
    """A group beyond `min` without work for this long is given back."""
    timeout_seconds: Positive = 600.0
    """A collective or the set-up of a group that takes longer counts as a lost group."""


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
    recovery: RecoveryConfig = RecoveryConfig()
    gpus: Annotated[int, Field(ge=0)] | None = None
    """One pool for all work: so many GPUs, in groups that score, answer or train, whatever waits (`groups.max` and
    `synthesis.actors` are then not read). 0 does the same without GPUs, with up to `groups.max` groups. null gives
    scoring and training pools of their own, whose sizes are yours to balance."""

    @property
    def shared_pool(self) -> bool:
        """Whether the groups that train also score and answer."""
        return self.gpus is not None

    @property
    def group_pool(self) -> GroupsConfig:
        """`groups` with what `gpus` decides."""
        if not self.gpus:
            return self.groups
        num_gpus = self.groups.num_gpus or 1.0
        most = int(self.gpus / (num_gpus * self.groups.shards))
        return self.groups.model_copy(update={"min": min(self.groups.min, most), "max": most, "num_gpus": num_gpus})

    @model_validator(mode="after")
    def _one_pool_can_do_all(self) -> "RunConfig":
        if self.gpus is None:
            return self
        backend, actors = self.synthesis.rewrite.backend, self.synthesis.actors
        if backend not in ("self", "none"):
            raise ValueError(
                f"gpus = {self.gpus} is for a backbone that answers itself (synthesis.rewrite.backend self or none); "
                f"with {backend} set groups.max and synthesis.actors.max"
            )
        if (actors.shards, actors.cpu_threads) != (self.groups.shards, self.groups.cpu_threads):
            raise ValueError("gpus needs the same shards and cpu_threads in groups and synthesis.actors")
        if self.group_pool.max < 1:
            raise ValueError(
                f"gpus = {self.gpus} is less than one group takes: groups.shards = {self.groups.shards} of "
                f"groups.num_gpus = {self.groups.num_gpus or 1:g}"
            )
        return self

    @model_validator(mode="after")
    def _comparable(self) -> "RunConfig":
        if self.evaluation.enabled and self.learning.is_weight_level:
            raise ValueError(
                f"learning.method = {self.learning.method} chooses single weights, and the comparison at the end is of "
                "masks of channels; set evaluation.enabled to false"
            )
        return self
