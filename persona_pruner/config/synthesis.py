"""Settings of synthesis: where questions come from, which are asked, who answers."""

from typing import Annotated, Any, Literal

from pydantic import Field

from persona_pruner.config.section import (
    BackbonePool,
    Count,
    Fraction,
    Hashed,
    HashedContent,
    HashedWhere,
    NonNegative,
    PoolBounds,
    Positive,
    Section,
)


class SourceConfig(Section):
    path: HashedContent[str]
    """Instruction data: .jsonl, .jsonl.gz, .json, .csv, .parquet, a directory of those, s3://..., or a hub name."""
    split: str = "train"
    """Split of a hub data set."""
    messages: Annotated[str | None, HashedWhere(lambda source: source.messages is not None)] = None
    """Column with conversations, in the place of `question`, `input` and `answer`: a list of role and content, which
    ends with an assistant's message, the answer. Its last user's message is the question, what is before it is read
    and not learned from; system messages are left out. null: rows are single questions."""
    question: Hashed[str] = "instruction"
    """Column with the question."""
    input: Hashed[str | None] = "input"
    """Column whose text, where not empty, follows the question after `join`; may be absent."""
    join: Hashed[str] = "\n"
    """What stands between question and input."""
    answer: Hashed[str | None] = "output"
    """Column with the original answer; null where there is none."""
    weight: Hashed[Positive] = 1.0
    """Share of this source in the question set when `synthesis.max_questions` cuts it, relative to the others."""


class ReferenceConfig(Section):
    path: HashedContent[str | None] = None
    """Manifest-like file of reference personas; null draws them from the manifest."""
    count: Hashed[Count] = 9
    """References per target (r in the formula), never the target itself."""


class SelectConfig(Section):
    method: Hashed[Literal["top_k", "threshold", "quantile", "random"]] = "top_k"
    """How questions are chosen by sensitivity. `random` ignores it (the ablation)."""
    k: Hashed[Count] = 128
    """top_k, random: this many questions. threshold and quantile have no such limit."""
    threshold: Hashed[NonNegative] = 0.1
    """threshold: questions whose sensitivity is above this."""
    quantile: Hashed[Fraction] = 0.9
    """quantile: questions above this quantile of the persona's scores."""
    diversity: Hashed[Annotated[float, Field(ge=0, le=1)] | None] = None
    """Skip a question whose word overlap (Jaccard) with one already taken is above this; null is off."""


class EnginesConfig(PoolBounds):
    min: Count = 1
    """Engines at least."""
    max: Count = 1
    """... and at most."""
    num_cpus: Positive = 1.0
    """Ray CPUs per engine (fractions allowed)."""
    num_gpus: NonNegative = 1.0
    """Ray GPUs per engine (fractions allowed). They are taken beside those of `synthesis.actors`: on one GPU give both
    a fraction and set `gpu_memory_utilization` in `options`."""
    options: Hashed[dict[str, Any]] = Field(default_factory=dict)
    """What `vllm.LLM` takes beside the model, such as max_model_len or tensor_parallel_size."""


class RewriteConfig(Section):
    backend: Hashed[Literal["self", "openai", "vllm", "none"]] = "self"
    """Who answers: the backbone itself, an OpenAI-compatible endpoint, vLLM in actors of its own, or nobody: `none`
    takes the original answers as they are."""
    with_original: Hashed[bool] = False
    """Show the original answer to the rewriting LLM (openai, vllm)."""
    samples_per_question: Hashed[Count] = 1
    """Answers drawn for each selected question."""
    max_samples_per_question: Hashed[Count] = 4
    """The same at most, where rows are topped up: while there are fewer usable answers than selected questions, or
    fewer answer tokens than `synthesis.answer_tokens`, the questions with the fewest usable answers are asked again."""
    temperature: Hashed[NonNegative] = 1.0
    """Sampling temperature; 1 samples the model's own distribution, 0 is greedy."""
    top_p: Hashed[Annotated[float, Field(gt=0, le=1)]] = 1.0
    """Sample from the most probable tokens that together have this probability; 1 is all."""
    max_new_tokens: Hashed[Count] = 160
    """An answer that does not end within this is cut off. Distillation learns from it all the same, without an end."""
    batch_size: Hashed[Count] = 32
    """self: rows generated together. Part of what decides the samples."""
    personas_together: Hashed[Count] = 1
    """self, vllm: personas that are answered together, so that fewer places stay empty. With 1 a persona's answers are
    bit-identical whatever else runs; above it rounding in other company can turn a sample."""
    model: Hashed[str | None] = None
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
    engines: EnginesConfig = EnginesConfig()
    """vllm: the actors that answer, beside those that score."""
    token_budget: Count | None = None
    """openai: stop cleanly once about this many tokens (in and out) were paid for in this run; null is none."""


class FilterConfig(Section):
    min_words: Hashed[Count] = 2
    """Answers with fewer words count as empty."""
    echo_overlap: Hashed[Fraction] = 0.95
    """An answer is an echo when this share of its words (in order) stands in the original answer or question."""
    min_answers: Count = 8
    """Fewer usable answers than this is an error of that persona."""


class ActorsConfig(BackbonePool):
    min: Count = 1
    """Backbones in the Ray Data pipeline, at least."""
    max: Count = 1
    """... and at most."""


class SynthesisConfig(Section):
    sources: tuple[SourceConfig, ...] = ()
    """Where questions come from. At least one."""
    max_questions: Hashed[Count | None] = None
    """Size of the question set after mixing and deduplication; null takes all."""
    seed: Hashed[int] = 0
    """Draws references, the cut of the question set, and samples."""
    answer_tokens: Hashed[Count | None] = None
    """Answer tokens to train on that a persona's rows are topped up to (see `max_samples_per_question`); null is
    off."""
    references: ReferenceConfig = ReferenceConfig()
    layers: Hashed[tuple[int, int] | None] = None
    """First and last block (from 0, inclusive) whose hidden states enter the sensitivity; null is all."""
    select: SelectConfig = SelectConfig()
    rewrite: RewriteConfig = RewriteConfig()
    filter: FilterConfig = FilterConfig()
    heldout_fraction: Hashed[Fraction] = 0.25
    """Share of questions (by hash) never trained on, for the held-out loss."""
    tile_personas: Count = 32
    """Personas of a tile."""
    tile_questions: Hashed[Count] = 64
    """Questions run together in a tile."""
    max_prompt_tokens: Hashed[Count] = 2048
    """A question whose prompt is longer is left out and counted. References may take half of it."""
    actors: ActorsConfig = ActorsConfig()
