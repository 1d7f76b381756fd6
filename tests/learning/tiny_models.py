"""Tiny random models of every family, with a byte tokenizer and a chat template."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.load import check_config
from persona_pruner.config.schema import BackboneConfig, RunConfig
from persona_pruner.dataset import PersonaData, Row

SPECIAL = ["<pad>", "<bos>", "<head>", "</head>", "<eot>"]
TEMPLATE = (
    "<bos>{% for m in messages %}<head>{{ m['role'] }}</head>{{ m['content'] | trim }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<head>assistant</head>{% endif %}"
)
VOCABULARY = 256 + len(SPECIAL)

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 4, "initializer_range": 0.15,
}  # fmt: skip
GATED = {**COMMON, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "mistral": {**GATED, "sliding_window": None},
    "gemma": GATED,
    "gemma2": {**GATED, "sliding_window": 512, "query_pre_attn_scalar": 8},
    "gemma3_text": {**GATED, "sliding_window": 512, "query_pre_attn_scalar": 8},
    "phi3": {**GATED, "sliding_window": None, "original_max_position_embeddings": 512},
    "gpt_neox": {**COMMON, "intermediate_size": 64},
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.15},
}
SCALED_HEADS = {"cohere": {**GATED, "logit_scale": 0.3}, "granite": {**GATED, "logits_scaling": 4.0}}


def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eot>",
        additional_special_tokens=["<head>", "</head>"],
    )  # fmt: skip
    wrapped.chat_template = TEMPLATE
    return wrapped


def save_tiny(to: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model on disk; the same bytes each time."""
    config = AutoConfig.for_model(family, **{**(FAMILIES | SCALED_HEADS)[family], **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(to)
    tokenizer().save_pretrained(to)
    return to


def tiny(to: Path, family: str = "llama", **changes: Any) -> Backbone:
    return load_backbone(BackboneConfig(path=str(save_tiny(to, family, **changes))), deepspeed=False)


def persona_data(name: str, rows: int = 12, heldout: int = 4) -> PersonaData:
    """Ragged rows that differ from persona to persona."""
    made = [
        Row(f"{name} asks{' again' * (n % 3)}?", f"Well, {name * (1 + n % 4)}{' indeed' * (n % 5)} {n}.")
        for n in range(rows + heldout)
    ]
    description = f"{name} the {'very ' * len(name)}good"
    return PersonaData(name, description, tuple(made[heldout:]), tuple(made[:heldout]), f"sha-{name}")


def tiny_config(path: Path | str = "tiny", **learning: Any) -> RunConfig:
    return check_config(
        {
            "backbone": {"path": str(path)},
            "prompt": {"system": "You are {persona}."},
            "learning": {"channel_multiple": 8, "rows_per_step": 5, "steps": 20, "evaluate_every": 10, **learning},
        }
    )
