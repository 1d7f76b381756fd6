"""A persona that is asked, and under which masks: unpruned, its own, one mask for all, another persona's, baselines'.

Shapes: L layers, I FFN channels, D model width, T tokens.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from persona_pruner.backbone.continuous import decoder_for
from persona_pruner.backbone.decoding import Prompt, Sampled, Sampling
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import answer_tokens
from persona_pruner.config.evaluation import Baseline
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, read_persona_data, uses_unfinished_answers
from persona_pruner.errors import PersonaError
from persona_pruner.evaluation.baselines import Baselines, added_biases
from persona_pruner.manifest import Persona
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

ARMS = ("unpruned", "own", "global", "other", *get_args(Baseline))


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """One persona to be asked. Names only: the worker reads masks and data itself."""

    persona_id: str
    other_id: str | None
    """Whose mask the arm "other" is."""
    candidates: tuple[str, ...]
    """Personas whose descriptions stand beside the own one in the classifier."""
    global_key: str | None
    digests: Mapping[str, str]
    """By kind of what it is asked: of everything that decides the rows."""


@dataclass(frozen=True)
class Arm:
    name: str
    mask: str
    """Whose mask it is; empty where there is none."""
    keep_LI: Tensor
    bias_LD: Tensor | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.keep_LI.cpu().numpy().tobytes()).hexdigest() if self.mask else ""


@dataclass(frozen=True)
class Subject:
    backbone: Backbone
    config: RunConfig
    storage: Storage
    persona: Persona
    data: PersonaData | None
    """None where they were removed, or never there: an imported mask."""
    arms: tuple[Arm, ...]
    """Those that there are, in the order of ARMS."""
    others: tuple[str, ...]
    """Descriptions that stand beside the own one in the classifier."""

    @property
    def room(self) -> int:
        """Tokens that a prompt may have. An answer that is encoded again may be longer than it was sampled, hence 2."""
        positions = getattr(self.backbone.model.config, "max_position_embeddings", None)
        most = self.config.learning.max_row_tokens
        return min(most, positions or most) - 2 * self.config.evaluation.answers.max_new_tokens

    def decode(self, prompts: Sequence[Prompt]) -> list[Sampled]:
        """In the order of `prompts`, each under the arm that its mask numbers, all arms in one stream of batches; an
        arm with biases has a stream of its own. Every rank of a group calls it and gets the whole."""
        settings, end = self.config.evaluation.answers, answer_tokens(self.backbone.tokenizer, "a")[-1]
        sampling = Sampling(settings.temperature, settings.top_p, end, settings.batch_size)
        streams: dict[int | None, list[int]] = {}
        for number, prompt in enumerate(prompts):
            streams.setdefault(prompt.mask if self.arms[prompt.mask].bias_LD is not None else None, []).append(number)
        sampled: dict[int, Sampled] = {}
        for arm, numbers in streams.items():
            with added_biases(self.backbone, None if arm is None else self.arms[arm].bias_LD):
                sampled |= zip(numbers, self._decode(sampling, [prompts[i] for i in numbers]), strict=True)
        return [sampled[i] for i in range(len(prompts))]

    def _decode(self, sampling: Sampling, prompts: Sequence[Prompt]) -> list[Sampled]:
        """Each rank decodes its part."""
        backbone, keeps_MLI = self.backbone, torch.stack([arm.keep_LI for arm in self.arms])
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].mask, len(prompts[i].suffix), i))
        mine = order[backbone.world.rank :: backbone.world.size]
        with BackboneRunner(backbone) as runner:
            decoder = decoder_for(runner, sampling, prompts, keeps_MLI.to(backbone.device))
            own = dict(zip(mine, decoder.decode([prompts[i] for i in mine]), strict=True))
        sampled: dict[int, Sampled] = {}
        for of_rank in backbone.gather(own):
            sampled |= of_rank
        return [sampled[i] for i in range(len(prompts))]


def read_subject(baselines: Baselines, storage: Storage, task: AnswerTask) -> Subject:
    """Read the masks and data of a task, and make the baselines' masks. Every rank of a group calls it.

    Raises PersonaError, MaskError, StorageError.
    """
    backbone, config = baselines.backbone, baselines.config
    own = _load(storage, keys.mask(task.persona_id), backbone)
    if not own.metadata.persona_description:
        raise PersonaError("no_description", "its mask carries no description: make the mask again with this release")
    persona = Persona(task.persona_id, own.metadata.persona_description)
    data = _data(storage, config, persona)
    arms = [Arm("unpruned", "", torch.ones_like(own.keep_LI)), Arm("own", task.persona_id, own.keep_LI)]
    for name, whose, key in (
        ("global", "global", task.global_key),
        ("other", task.other_id or "", keys.mask(task.other_id) if task.other_id else None),
    ):
        if key is not None:
            arms.append(Arm(name, whose, _load(storage, key, backbone).keep_LI))
    for method in config.evaluation.answers.baselines:
        made = baselines.mask(method, own.keep_LI.sum(1), data)
        if made is not None:
            arms.append(Arm(method, method, *made))
    candidates = [_load(storage, keys.mask(name), backbone).metadata.persona_description for name in task.candidates]
    arms.sort(key=lambda arm: ARMS.index(arm.name))
    others = tuple(text for text in candidates if text)
    return Subject(backbone, config, storage, persona, data, tuple(arms), others)


def _load(storage: Storage, key: str, backbone: Backbone) -> Mask:
    where = f"{storage.url}/{key}"
    mask = Mask.from_bytes(storage.get(key), where)
    mask.check(where, backbone_fingerprint=backbone.fingerprint)
    return mask


def _data(storage: Storage, config: RunConfig, persona: Persona) -> PersonaData | None:
    try:
        return read_persona_data(storage, persona, unfinished=uses_unfinished_answers(config))
    except PersonaError as error:
        if error.cause != "no_data":
            raise
        return None
