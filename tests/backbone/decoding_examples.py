"""Tiny random models of many kinds of attention, prompts behind prefixes longer than their windows, and the oracle:
every row alone, the whole sequence run again for every token."""

import dataclasses

import torch
from tiny_models import GATED, VOCABULARY, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.decoding import Prompt, Sampling, choose
from persona_pruner.backbone.load import Backbone, World

WINDOW = 16
PREFIX = 25
LIMIT = 12
END = 4

HALF = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW, "original_max_position_embeddings": 512},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, **HALF},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, **HALF},
    "cohere2": {"sliding_window": WINDOW, "logit_scale": 0.3, **HALF},
    "exaone4": {"sliding_window": WINDOW, **HALF},
    "olmo3": {"sliding_window": WINDOW, **HALF},
}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
HYBRID = {
    "qwen3_5_text": {**LINEAR, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "olmo_hybrid": {**LINEAR, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}


def random_model(directory, family):
    changes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.15} if family == "opt" else {**GATED}
    config = AutoConfig.for_model(family, **{**GATED, **changes, **(FAMILIES | HYBRID).get(family, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if family == "gemma2" else "sdpa")
    model = model.float().requires_grad_(False).eval()
    return Backbone(model, tokenizer(), family, "0" * 64, torch.device("cpu"), World(), directory)


def prompts(rows, personas, ragged=False):
    """Suffixes of 1 to 9 tokens in turn behind one prefix for each persona; `ragged`: limits of 2 tokens or more."""
    source = torch.Generator().manual_seed(1)

    def tokens(count):
        return tuple(torch.randint(5, VOCABULARY, (count,), generator=source).tolist())

    prefixes = [tokens(PREFIX + 3 * number) for number in range(personas)]
    return [
        Prompt(
            prefixes[row * personas // rows],
            tokens(1 + 4 * row % 9),
            torch.rand(2 + 5 * row % (LIMIT - 1) if ragged else LIMIT, generator=source).double(),
        )
        for row in range(rows)
    ]


def sampling(batch_size=4):
    return Sampling(temperature=0.8, top_p=0.95, end=END, batch_size=batch_size)


def under_three_masks(asked):
    """The prompts under masks 0, 1, 2 in turn (the first keeps everything), in the order of their prefixes."""
    masks_MLI = torch.rand(3, 3, 64, generator=torch.Generator().manual_seed(2)) > 0.4
    masks_MLI[0] = True
    prompts = [dataclasses.replace(prompt, mask=number % 3) for number, prompt in enumerate(asked)]
    return masks_MLI, sorted(prompts, key=lambda prompt: (prompt.prefix, prompt.mask))


def plain_samples(backbone, asked, masks_MLI=None):
    with ChannelMasks(backbone.model) as masks, torch.no_grad():
        return [_plain_sample(backbone, prompt, masks, masks_MLI) for prompt in asked]


def _plain_sample(backbone, prompt, masks, masks_MLI):
    masks.set(None if masks_MLI is None else masks_MLI[prompt.mask])
    out = []
    for draw in prompt.draws_T:
        logits = backbone.model(torch.tensor([[*prompt.prefix, *prompt.suffix, *out]]), use_cache=False).logits
        token = choose(logits[:, -1], draw[None], sampling()).item()
        if token == END:
            break
        out.append(token)
    return out
