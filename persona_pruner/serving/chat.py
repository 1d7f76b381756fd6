"""A conversation with a persona in this process, without a server: one backbone, the mask set per answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.backbone.prompts import dated_template, knows_system_role
from persona_pruner.config.schema import BackboneConfig, PromptConfig
from persona_pruner.errors import UserError
from persona_pruner.masks.format import Mask
from persona_pruner.masks.store import MaskStore, stored_global_mask
from persona_pruner.serving.personas import read_prompt

UNPRUNED, GLOBAL = "unpruned", "global"
Message = dict[str, str]


@dataclass
class Sampling:
    max_tokens: int = 160
    temperature: float = 0.0
    seed: int = 0


class PersonaChat:
    """Answers as one persona, under its own mask, another persona's, one for all, or none: the mask alone differs."""

    def __init__(
        self,
        output: str | Path,
        backbone: str,
        persona_id: str,
        other_id: str | None = None,
        *,
        with_global: bool = False,
    ) -> None:
        """other_id: for comparisons; the first other persona of the run where it is None. with_global: also the one
        mask for all personas that the run has made. Raises UserError."""
        store = MaskStore(output)
        self.persona_id = persona_id
        self._masks: dict[str, Mask | None] = {UNPRUNED: None, persona_id: store.load_channels(persona_id)}
        other_id = other_id or next((name for name in store.ids() if name != persona_id), None)
        if other_id is not None:
            self._masks[other_id] = store.load_channels(other_id)
        if with_global:
            self._masks[GLOBAL] = _global_mask(store)
        self._prompt: PromptConfig = read_prompt(store)
        self._backbone: Backbone = load_backbone(BackboneConfig(path=backbone), deepspeed=False)
        for name, mask in self._masks.items():
            if mask:
                mask.check(f"mask of {name}", backbone_fingerprint=self._backbone.fingerprint)
        tokenizer = self._backbone.tokenizer
        tokenizer.chat_template = dated_template(tokenizer, self._prompt.date)
        self._system_role = knows_system_role(tokenizer)

    @property
    def names(self) -> list[str]:
        """unpruned, the persona, another persona, global."""
        return list(self._masks)

    @torch.no_grad()
    def answer(self, conversation: list[Message], under: str, sampling: Sampling) -> str:
        """The next message of a conversation that ends with the user's, under one of `names`."""
        mask = self._masks[under]
        tokenizer: Any = self._backbone.tokenizer
        model: Any = self._backbone.model
        inputs = tokenizer.apply_chat_template(
            self._with_system(conversation), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self._backbone.device)
        torch.manual_seed(sampling.seed)
        drawn = (
            {"do_sample": True, "temperature": sampling.temperature} if sampling.temperature else {"do_sample": False}
        )
        with ChannelMasks(model) as masks:
            masks.set(mask.keep_LI.to(self._backbone.device) if mask else None)
            tokens = model.generate(**inputs, max_new_tokens=sampling.max_tokens, **drawn)
        return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    def compare(self, question: str, sampling: Sampling) -> dict[str, str]:
        """One question, answered under each of `names`."""
        return {name: self.answer([{"role": "user", "content": question}], name, sampling) for name in self.names}

    def _with_system(self, conversation: list[Message]) -> list[Message]:
        mask = self._masks[self.persona_id]
        description = mask.metadata.persona_description if mask else ""
        if not description:
            raise UserError(f"the mask of {self.persona_id} carries no description; make it again with this release")
        system = self._prompt.system.replace("{persona}", description)
        if self._system_role:
            return [{"role": "system", "content": system}, *conversation]
        first = {"role": "user", "content": f"{system}\n\n{conversation[0]['content']}"}
        return [first, *conversation[1:]]


def _global_mask(store: MaskStore) -> Mask:
    key = stored_global_mask(store.storage)
    if key is None:
        raise UserError(
            f"{store.storage.url}: there is no mask for all personas; a run with evaluation.enabled or with "
            "learning.init: pooled makes one"
        )
    return Mask.from_bytes(store.storage.get(key), f"{store.storage.url}/{key}")
