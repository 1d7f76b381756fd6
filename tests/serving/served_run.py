"""A run to serve: the shipped backbone and masks of many personas, each keeping other channels, some layers more."""

import datetime
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.load import fingerprint
from persona_pruner.masks.format import Mask, MaskMetadata
from persona_pruner.serving.mask_table import ffn_shape
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

PERSONAS = [f"keeper-{number}" for number in range(9)]
DATE = datetime.date(2020, 2, 29)
ROUNDING = 1e-4
"""Of logits in float32; a wrong mask differs by 0.1 and more."""
TODAY = "{{ strftime_now('%d %b %Y') }}"
SYSTEM = "You speak as {persona}. Answer kindly."
EXAMPLE = Path(__file__).parents[2] / "manifests" / "quickstart" / "backbone"


def description_of(persona_id: str) -> str:
    return f"{persona_id}, a keeper of lighthouses"


@dataclass
class ServedRun:
    """`plain` is the backbone in transformers, the reference for every engine; `tokenizer` renders DATE as today."""

    output: Path
    backbone: Path
    fingerprint: str
    plain: Any
    tokenizer: Any

    def mask(self, persona_id: str, version: int = 0, ratio: float = 0.25) -> Mask:
        layers, channels = ffn_shape(self.plain.config)
        seed = [version, *persona_id.encode()]
        scores_LI = torch.from_numpy(np.random.default_rng(seed).random((layers, channels)))
        even = round(channels * (1 - ratio))
        kept = tuple(even + (32 if layer % 2 else -32) for layer in range(layers))
        rank_LI = scores_LI.argsort(dim=1).argsort(dim=1)
        keep_LI = rank_LI < torch.tensor(kept)[:, None]
        metadata = MaskMetadata(
            persona_id=persona_id, persona_sha256="", persona_description=description_of(persona_id),
            backbone=self.backbone.name, backbone_fingerprint=self.fingerprint, layers=layers, channels=channels,
            kept=kept, method="random", ratio=ratio, seed=version, steps=0,
        )  # fmt: skip
        return Mask(keep_LI, metadata)

    def commit(self, *masks: Mask) -> None:
        storage = open_storage(self.output)
        for mask in masks:
            storage.put(keys.mask(mask.metadata.persona_id), mask.to_bytes())

    def prompt(self, persona_id: str | None, question: str) -> list[int]:
        """Token ids, as the server must render them."""
        system = [{"role": "system", "content": SYSTEM.replace("{persona}", description_of(persona_id or ""))}]
        messages = [*(system if persona_id else []), {"role": "user", "content": question}]
        return list(
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        )

    def is_greedy(self, mask: Mask | None, prompt: list[int], answer: list[int]) -> bool:
        """Whether each token of the answer is what plain transformers choose under that mask alone, or as good: the
        matrix products of another processor may round a tie the other way."""
        with ChannelMasks(self.plain) as masks, torch.no_grad():
            masks.set(mask.keep_LI if mask else None)
            logits = self.plain(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        return bool((logits.max(-1).values - chosen < ROUNDING).all())

    def greedy_text(self, mask: Mask | None, prompt: list[int], tokens: int) -> str:
        with ChannelMasks(self.plain) as masks, torch.no_grad():
            masks.set(mask.keep_LI if mask else None)
            found = self.plain.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False)
        return str(self.tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True))


def make_run(to: Path, backbone: Path | None = None) -> ServedRun:
    """Without a backbone: the shipped one, with a chat template that asks for today's date as Llama 3.2's does."""
    to.mkdir(parents=True, exist_ok=True)
    prompt = {"system": SYSTEM, "date": DATE.isoformat()}
    (to / keys.RUN).write_text(json.dumps({"settings": {"prompt": prompt}}))
    backbone = backbone or _with_date(to / "models" / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.chat_template = tokenizer.chat_template.replace(TODAY, f"{DATE:%d %b %Y}")
    plain = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    return ServedRun(to, backbone, fingerprint(backbone), plain, tokenizer)


def _with_date(to: Path) -> Path:
    shutil.copytree(EXAMPLE, to)
    template = to / "chat_template.jinja"
    template.write_text(template.read_text().replace("{% for", f"Today: {TODAY}\n{{% for", 1))
    return to
