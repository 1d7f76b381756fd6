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

from persona_pruner.backbone.forward import Prefix, Runner, pad_rows
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import persona_prefix, question_suffix
from persona_pruner.config import RunConfig
from persona_pruner.manifest import Persona


def choose_references(personas: Sequence[Persona], count: int, seed: int) -> list[Persona]:
    """`count` + 1 personas by seed: the last one stands in where a target is itself among the others."""
    ordered = sorted(personas, key=lambda p: hashlib.sha256(f"{seed}\0{p.id}\0{p.sha256}".encode()).digest())
    return ordered[: count + 1]


class Sensitivity:
    """Scores questions for personas with one backbone. A persona's scores depend on it, the references and the
    questions only: every batch holds one persona and one fixed chunk of questions."""

    def __init__(
        self, backbone: Backbone, config: RunConfig, questions: Sequence[str], references: Sequence[Persona]
    ) -> None:
        self.config = config
        self.questions = list(questions)
        self.references = list(references)
        self.runner = Runner(backbone)
        self.tokenizer = backbone.tokenizer
        self._layers = _decoder_layers(backbone.model)
        first, last = config.synthesis.layers or (0, len(self._layers) - 1)
        self._range = range(first, min(last, len(self._layers) - 1) + 1)
        suffixes = self._suffixes("A person.")
        size = config.synthesis.tile_questions
        order = sorted(range(len(questions)), key=lambda i: (len(suffixes[i]), i))
        self.chunks = [order[i : i + size] for i in range(0, len(order), size)]

    def _suffixes(self, description: str) -> list[list[int]]:
        system = self.config.prompt.system
        return [question_suffix(self.tokenizer, system, description, question) for question in self.questions]

    @torch.no_grad()
    def tile(self, personas: Sequence[Persona]) -> Iterator[tuple[Persona, Tensor]]:
        """(persona, scores float32 [Q]) for each persona of a tile, in order."""
        prompts = {p.id: _Prompt(self, p) for p in [*self.references, *personas]}
        scores = {p.id: torch.zeros(len(self.questions)) for p in personas}
        for chunk in self.chunks:
            units = [prompts[p.id].unit_states(chunk) for p in self.references]
            everyone = {p.id: unit for p, unit in zip(self.references, units, strict=True)}
            for persona in personas:
                others = [u for p, u in zip(self.references, units, strict=True) if not same(p, persona)]
                others = others[: self.count]
                own_LQD = everyone.get(persona.id)
                if own_LQD is None or not any(same(p, persona) for p in self.references):
                    own_LQD = prompts[persona.id].unit_states(chunk)
                sum_LQD = torch.stack(others).sum(0)
                cosine_Q = (sum_LQD * own_LQD).sum(-1).mean(0)
                scores[persona.id][chunk] = (1 - cosine_Q / len(others)).float().cpu()
        yield from ((persona, scores[persona.id]) for persona in personas)

    @property
    def count(self) -> int:
        return self.config.synthesis.references.count

    def states(self, tokens_QT: Tensor, lengths_Q: Tensor, prefix: Prefix | None) -> Tensor:
        """Hidden states [L, Q, D] after each block of the range, at the last token of each right-padded row."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            kept.append(hidden[torch.arange(len(hidden)), lengths_Q - 1])

        hooks = [self._layers[i].register_forward_hook(keep) for i in self._range]
        try:
            self.runner.masks.set(None)
            rows = torch.zeros(len(tokens_QT), dtype=torch.long, device=tokens_QT.device)
            self.runner.hidden(tokens_QT, prefix, rows if prefix is not None else None)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(kept)


class _Prompt:
    """One persona's prefix, run once, and its questions behind it."""

    def __init__(self, owner: Sensitivity, persona: Persona) -> None:
        self.owner = owner
        system = owner.config.prompt.system
        self.prefix_tokens = persona_prefix(owner.tokenizer, system, persona.description)
        self.suffixes = owner._suffixes(persona.description)
        longest = max(map(len, self.suffixes))
        owner.runner.masks.set(None)
        shared = owner.runner.can_share([self.prefix_tokens], longest)
        self.prefix = owner.runner.prefix([self.prefix_tokens]) if shared else None

    def unit_states(self, chunk: Sequence[int]) -> Tensor:
        """Unit vectors [L, Q, D] (float32) of a chunk."""
        rows = [self.suffixes[i] if self.prefix else [*self.prefix_tokens, *self.suffixes[i]] for i in chunk]
        device = self.owner.runner.backbone.device
        tokens_QT = pad_rows(rows, self.owner.runner.pad).to(device)
        lengths_Q = torch.tensor([len(row) for row in rows], device=device)
        return nn.functional.normalize(self.owner.states(tokens_QT, lengths_Q, self.prefix).float(), dim=-1)


def same(one: Persona, other: Persona) -> bool:
    return one.id == other.id and one.description == other.description


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)  # type: ignore[arg-type]
