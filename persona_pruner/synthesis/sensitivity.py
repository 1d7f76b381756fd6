"""How much a question reveals a persona: the mean distance of the target's hidden states from the references'.

`s(q; P*) = 1/(B r) sum_b sum_j (1 - cos(h_Pj^b(q), h_P*^b(q)))` (Persona-Pruner), h after block b at the last prompt
token. With unit vectors u, `sum_j cos(h_j, h*) = <sum_j u_j, u*>`: references enter through their sum, so they run once
a question and not once a question and target. A persona's system prompt runs once; its questions run behind it.

Shape suffixes: L blocks of the layer range, Q questions, D model width, T tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from persona_pruner import activity
from persona_pruner.backbone.channels import decoder_layers, forward_hooks
from persona_pruner.backbone.forward import BackboneRunner, PrefixCache, pad_rows
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import persona_prefix, question_suffix
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import BackboneError, PersonaError
from persona_pruner.manifest import Persona


def choose_references(personas: Sequence[Persona], count: int, seed: int) -> list[Persona]:
    """Candidates by seed. `Sensitivity` takes the first `count` + 1 that fit: one stands in where a target is itself
    among the others; the rest replace personas whose description is too long."""
    ordered = sorted(personas, key=lambda p: hashlib.sha256(f"{seed}\0{p.id}\0{p.sha256}".encode()).digest())
    return ordered[: 4 * (count + 1)]


class Sensitivity:
    """Scores questions for personas with one backbone. A persona's scores depend on it, the references and the
    questions only: every batch holds one persona and one fixed chunk of questions. With a sharded backbone each rank
    runs its part of every chunk, and every rank has all scores in the end.

    Raises BackboneError where fewer than two reference candidates fit in half of `synthesis.max_prompt_tokens`.
    """

    def __init__(
        self, backbone: Backbone, config: RunConfig, questions: Sequence[str], references: Sequence[Persona]
    ) -> None:
        self.count = config.synthesis.references.count
        self.runner = BackboneRunner(backbone)
        self._tokenizer = backbone.tokenizer
        self._prompt = config.prompt
        self._questions = list(questions)
        self._limit = config.synthesis.max_prompt_tokens
        self._layers = decoder_layers(backbone.model)
        first, last = config.synthesis.layers or (0, len(self._layers) - 1)
        self._range = range(first, min(last, len(self._layers) - 1) + 1)
        self._plain = [self._suffix("A person.", question) for question in questions]
        half = self._limit // 2
        fitting = [p for p in references if len(self._prefix(p)) <= half][: self.count + 1]
        if len(fitting) < min(2, len(references)):
            raise BackboneError(
                f"{len(fitting)} of {len(references)} reference personas fit in {half} tokens, half of "
                "synthesis.max_prompt_tokens; raise it, or shorten the descriptions"
            )
        room = self._limit - max(len(self._prefix(p)) for p in fitting)
        askable = [i for i, suffix in enumerate(self._plain) if suffix and len(suffix) <= room]
        size = config.synthesis.tile_questions
        order = sorted(askable, key=lambda i: (len(self._plain[i]), i))
        self.chunks = [order[i : i + size] for i in range(0, len(order), size)]
        self._askable = torch.zeros(len(questions), dtype=torch.bool)
        self._askable[order] = True
        with torch.no_grad():
            self.references = [_Prompt(self, p) for p in fitting]

    def _prefix(self, persona: Persona) -> list[int]:
        return persona_prefix(self._tokenizer, self._prompt, persona.description)

    def _suffix(self, description: str, question: str) -> list[int]:
        """Empty where the chat template has no place for this question."""
        try:
            return question_suffix(self._tokenizer, self._prompt, description, question)
        except BackboneError:
            return []

    def suffixes(self, description: str) -> list[list[int]]:
        """Tokens of every question behind this persona's prefix.

        What stands behind the prefix is the same for all personas with nearly every template. Rendering thousands of
        questions again for each persona would take longer than running them.
        """
        probes = [chunk[0] for chunk in self.chunks[:1] + self.chunks[-1:]]
        if probes and all(self._suffix(description, self._questions[i]) == self._plain[i] for i in probes):
            return self._plain
        return [self._suffix(description, question) for question in self._questions]

    @torch.no_grad()
    def tile(self, personas: Sequence[Persona]) -> Iterator[tuple[Persona, Tensor | PersonaError]]:
        """(persona, scores float32 [Q]) for each persona of a tile, in order; what is wrong with a persona in place of
        its scores. A score is NaN where the question was left out: its prompt is too long, or cannot be rendered."""
        prompts: dict[str, _Prompt] = {}
        scores_by_id: dict[str, Tensor | PersonaError] = {}
        for persona in personas:
            try:
                prompts[persona.id] = _Prompt(self, persona)
                scores_by_id[persona.id] = torch.zeros(len(self._questions))
            except PersonaError as error:
                scores_by_id[persona.id] = error
        world = self.runner.backbone.world
        for chunk in self.chunks:
            # Every rank takes part in every pass, also where the chunk has no question left for it.
            own_part = chunk[world.rank :: world.size]
            units = [reference.unit_states(own_part or chunk[:1]) for reference in self.references]
            for prompt in prompts.values():
                others, own_LQD = [], None
                for reference, unit in zip(self.references, units, strict=True):
                    if same(reference.persona, prompt.persona):
                        own_LQD = unit
                    else:
                        others.append(unit)
                others = others[: self.count]
                scores = scores_by_id[prompt.persona.id]
                assert isinstance(scores, Tensor)
                if own_LQD is None:
                    own_LQD = prompt.unit_states(own_part or chunk[:1])
                cosine_Q = (torch.stack(others).sum(0) * own_LQD).sum(-1).mean(0)
                scores[own_part] = (1 - cosine_Q / len(others)).float().cpu()[: len(own_part)]
                activity.count(activity.SCORING, done=len(own_part))
        for prompt in prompts.values():
            scores = scores_by_id[prompt.persona.id]
            assert isinstance(scores, Tensor)
            scores_by_id[prompt.persona.id] = self.runner.backbone.all_reduce(
                scores.to(self.runner.backbone.device)
            ).cpu()
        for persona in personas:
            yield persona, self._checked(scores_by_id[persona.id], prompts.get(persona.id))

    def _checked(self, scores: Tensor | PersonaError, prompt: "_Prompt | None") -> Tensor | PersonaError:
        if isinstance(scores, PersonaError) or prompt is None:
            return scores
        if not scores[self._askable].isfinite().all():
            return PersonaError("not_finite", "the backbone's hidden states under this description are not finite")
        room = self._limit - len(prompt.prefix_tokens)
        left_out = torch.tensor([not suffix or len(suffix) > room for suffix in prompt.suffixes])
        return scores.masked_fill(left_out | ~self._askable, torch.nan)

    def states(self, tokens_QT: Tensor, lengths_Q: Tensor, prefix: PrefixCache | None) -> Tensor:
        """Hidden states [L, Q, D] after each block of the range, at the last token of each right-padded row."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            kept.append(hidden[torch.arange(len(hidden)), lengths_Q - 1])

        self.runner.masks.set(None)
        rows = torch.zeros(len(tokens_QT), dtype=torch.long, device=tokens_QT.device)
        with forward_hooks((self._layers[i], keep) for i in self._range):
            self.runner.hidden(tokens_QT, prefix, rows if prefix is not None else None)
        return torch.stack(kept)


class _Prompt:
    """One persona's prefix, run once, and its questions behind it. Raises PersonaError (prompt_too_long)."""

    def __init__(self, owner: Sensitivity, persona: Persona) -> None:
        self.owner, self.persona = owner, persona
        self.prefix_tokens = owner._prefix(persona)
        if len(self.prefix_tokens) >= owner._limit:
            raise PersonaError(
                "prompt_too_long",
                f"the description makes a prompt of {len(self.prefix_tokens)} tokens, "
                f"synthesis.max_prompt_tokens is {owner._limit}",
            )
        self.suffixes = owner.suffixes(persona.description)
        longest = max((len(suffix) for suffix in self.suffixes if len(suffix) <= owner._limit), default=0)
        owner.runner.masks.set(None)
        shared = owner.runner.can_share([self.prefix_tokens], longest)
        self.prefix = owner.runner.prefix([self.prefix_tokens]) if shared else None

    def unit_states(self, chunk: Sequence[int]) -> Tensor:
        """Unit vectors [L, Q, D] (float32) of a chunk."""
        room = self.owner._limit - len(self.prefix_tokens)
        suffixes = [self.suffixes[i][:room] or [self.owner.runner.pad] for i in chunk]
        rows = suffixes if self.prefix else [[*self.prefix_tokens, *suffix] for suffix in suffixes]
        device = self.owner.runner.backbone.device
        tokens_QT = pad_rows(rows, self.owner.runner.pad).to(device)
        lengths_Q = torch.tensor([len(row) for row in rows], device=device)
        return nn.functional.normalize(self.owner.states(tokens_QT, lengths_Q, self.prefix).float(), dim=-1)


def same(one: Persona, other: Persona) -> bool:
    return one.id == other.id and one.description == other.description
