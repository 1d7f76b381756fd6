"""What a persona costs: tokens and FLOP from the settings, seconds and dollars on a kind of GPU.

Per token and parameter of the blocks 2 FLOP forward and 2 more for the gradient of the mask (the weights get none); the
same of the output head at answer tokens. Attention over so few tokens and the mask itself are left out: a few percent.
How much of a GPU's peak is reached is assumed (the constants below); docs/scaling.md says which figures are measured.
"""

import json
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.run.identity import Identity
from persona_pruner.run.plan import Plan
from persona_pruner.synthesis.sources import load_question_set

QUESTION_TOKENS = 30
"""A typical question behind its persona's prompt."""
ANSWER_SHARE = 0.6
"""A typical answer's share of `synthesis.rewrite.max_new_tokens`."""
CHARACTERS_PER_TOKEN = 4
MASK_BYTES = 1500
"""A mask object without its bits."""
UTILIZATION = 0.4
"""Share of peak FLOP/s in passes over many tokens."""
READ_SHARE = 0.6
"""Share of the memory's bandwidth where one token per row is decoded: the weights are read for each."""
BYTES_PER_PARAMETER = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Gpu:
    flops: float
    """Dense bfloat16, per second."""
    bandwidth: float
    """Bytes per second from its memory."""
    link: float
    """Bytes per second from the other GPUs of its node."""
    dollars: float
    """Per hour: an assumption, prices of clouds differ by a factor of three."""


GPUS = {
    "h100": Gpu(989e12, 3.35e12, 450e9, 3.0),
    "h200": Gpu(989e12, 4.8e12, 450e9, 3.8),
    "a100": Gpu(312e12, 2.04e12, 300e9, 1.8),
    "l40s": Gpu(362e12, 0.864e12, 32e9, 1.0),
}
"""Manufacturer's figures."""


@dataclass(frozen=True)
class ModelShape:
    layers: int
    channels: int
    """FFN channels of a layer."""
    blocks: float
    """Parameters of all blocks."""
    head: float
    """Parameters of the output head: vocabulary x width."""

    @classmethod
    def of_llama(cls, layers: int, width: int, channels: int, kv_width: int, vocabulary: int = 128_256) -> "ModelShape":
        block = 2 * width * width + 2 * width * kv_width + 3 * width * channels
        return cls(layers, channels, layers * block, vocabulary * width)


SHAPES = {
    "Llama-3.2-3B": ModelShape.of_llama(28, 3072, 8192, 1024),
    "8B": ModelShape.of_llama(32, 4096, 14336, 1024),
    "70B": ModelShape.of_llama(80, 8192, 28672, 1024),
}


def read_shape(path: Path) -> ModelShape:
    """Of a checkpoint in a directory, from its configuration and the headers of its weights."""
    from safetensors import safe_open

    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    values = values.get("text_config", values)
    width = values["hidden_size"]
    blocks = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            shapes = (weights.get_slice(name).get_shape() for name in weights.keys() if ".layers." in name)  # noqa: SIM118
            blocks += sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    channels = values.get("intermediate_size") or values.get("ffn_dim") or 4 * width
    return ModelShape(values["num_hidden_layers"], channels, blocks, values["vocab_size"] * width)


@dataclass(frozen=True)
class Work:
    """One phase of one persona. `passes` go over all weights; `decoded` of them give one token per row."""

    tokens: float
    flop: float
    passes: float
    decoded: float = 0.0

    def gpu_seconds(self, gpu: Gpu, shape: ModelShape, weight_bytes: int, shards: int) -> float:
        """Over all GPUs of a group. Shards gather each other's weights in every pass."""
        weights = (shape.blocks + shape.head) * weight_bytes
        compute = max(self.flop / (gpu.flops * UTILIZATION), self.decoded * weights / (gpu.bandwidth * READ_SHARE))
        return compute + shards * self.passes * weights * (shards - 1) / shards / gpu.link


def scoring(config: RunConfig, shape: ModelShape, prompt: float, questions: int) -> Work:
    """The persona's prompt once, every question behind it, and its share of the references' passes."""
    synthesis = config.synthesis
    share = 1 + (synthesis.references.count + 1) / synthesis.tile_personas
    tokens = prompt + share * questions * QUESTION_TOKENS
    return Work(tokens, 2 * shape.blocks * tokens, share * questions / synthesis.tile_questions + 1)


def answering(config: RunConfig, shape: ModelShape, prompt: float) -> Work:
    """Nothing where another model answers."""
    rewrite = config.synthesis.rewrite
    if rewrite.backend != "self":
        return Work(0, 0, 0)
    answers, length = _answers(config), ANSWER_SHARE * rewrite.max_new_tokens
    tokens = prompt + answers * (QUESTION_TOKENS + length)
    steps = answers * length / min(rewrite.batch_size, answers)
    return Work(tokens, 2 * shape.blocks * tokens + 2 * shape.head * answers * length, steps, steps)


def training(config: RunConfig, shape: ModelShape, prompt: float) -> Work:
    """All steps, and one pass more over its rows for first scores, targets of distillation and the held-out loss."""
    learning, rewrite = config.learning, config.synthesis.rewrite
    rows = _answers(config) * (1 - config.synthesis.heldout_fraction)
    length = ANSWER_SHARE * rewrite.max_new_tokens
    steps = learning.steps_for(max(1, round(rows)))
    tokens = steps * (prompt + learning.rows_per_step * (QUESTION_TOKENS + length))
    once = prompt + _answers(config) * (QUESTION_TOKENS + length)
    backward = 6 if learning.gradient_checkpointing else 4
    flop = backward * (shape.blocks * tokens + shape.head * steps * learning.rows_per_step * length)
    flop += 2 * (shape.blocks * once + shape.head * _answers(config) * length)
    row_tokens = learning.rows_per_step * (QUESTION_TOKENS + length) / config.groups.shards
    micro_batches = math.ceil(row_tokens / learning.micro_batch_tokens)
    return Work(tokens + once, flop, 2 * steps * micro_batches)


def _answers(config: RunConfig) -> int:
    return config.synthesis.select.k * config.synthesis.rewrite.samples_per_question


def mask_bytes(shape: ModelShape) -> int:
    return shape.layers * math.ceil(shape.channels / 8) + MASK_BYTES


@dataclass(frozen=True)
class Forecast:
    tokens: int
    flop: float
    bytes: int
    """Of masks."""
    gpu_hours: float
    hours: float
    """Until the last mask, with the GPUs that the configuration gives."""
    dollars: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "flop": self.flop,
            "bytes": self.bytes,
            "gpu_hours": float(f"{self.gpu_hours:.3g}"),
            "hours": float(f"{self.hours:.3g}"),
            "dollars": float(f"{self.dollars:.3g}"),
        }

    def describe(self, gpu: str) -> dict[str, str]:
        """For a reader."""
        end = datetime.now().astimezone() + timedelta(hours=self.hours)
        return {
            "tokens": f"about {self.tokens:,}",
            "flop": f"about {self.flop:.2e}",
            "bytes": f"about {self.bytes:,} for the masks",
            "GPU-hours": f"about {self.gpu_hours:.2g} on {gpu}, {self.dollars:.2g} dollars",
            "expected end": f"about {end:%Y-%m-%d %H:%M}, {self.hours:.2g} hours from now with the GPUs configured",
        }


@dataclass(frozen=True)
class Todo:
    """Personas that are left, and the mean characters of their system prompts."""

    synthesize: int
    train: int
    """Those with data; all of `synthesize` are trained too."""
    characters: float
    questions: int


def forecast(config: RunConfig, shape: ModelShape, todo: Todo, gpu: Gpu) -> Forecast:
    """For what is left to do. A pool without GPUs counts as one of one GPU per actor."""
    prompt = todo.characters / CHARACTERS_PER_TOKEN
    score, answer = scoring(config, shape, prompt, todo.questions), answering(config, shape, prompt)
    train = training(config, shape, prompt)
    weight_bytes = BYTES_PER_PARAMETER[config.backbone.dtype]
    groups, actors = config.group_pool, config.synthesis.actors
    synthesis_seconds = todo.synthesize * sum(
        work.gpu_seconds(gpu, shape, weight_bytes, actors.shards) for work in (score, answer)
    )
    trained = todo.synthesize + todo.train
    training_seconds = trained * train.gpu_seconds(gpu, shape, weight_bytes, groups.shards)
    for_groups = groups.max * groups.shards * (groups.num_gpus or 1)
    for_actors = actors.max * actors.shards * (actors.num_gpus or 1)
    seconds = max(training_seconds / for_groups, synthesis_seconds / for_actors)
    if config.shared_pool:
        seconds = (training_seconds + synthesis_seconds) / for_groups
    return Forecast(
        tokens=round(todo.synthesize * (score.tokens + answer.tokens) + trained * train.tokens),
        flop=todo.synthesize * (score.flop + answer.flop) + trained * train.flop,
        bytes=trained * mask_bytes(shape),
        gpu_hours=(synthesis_seconds + training_seconds) / 3600,
        hours=seconds / 3600,
        dollars=(synthesis_seconds + training_seconds) / 3600 * gpu.dollars,
    )


def forecast_plan(identity: Identity, plan: Plan, gpu: Gpu) -> Forecast:
    """For what a submission would do."""
    config = identity.config
    left = (*plan.to_train, *plan.to_synthesize)
    characters = sum(len(persona.description) for persona in left) / max(1, len(left)) + len(config.prompt.system)
    questions = len(load_question_set(config.synthesis)) if plan.to_synthesize else 0
    todo = Todo(len(plan.to_synthesize), len(plan.to_train), characters, questions)
    return forecast(config, read_shape(identity.path), todo, gpu)
