"""Seconds a (persona, question) pair: every reference run again for every target, as published, over tiles.

python tests/benchmarks/sensitivity.py [--questions 64] [--quick] [--backbone ../shared/data/backbone]

9 references; descriptions of about 220 tokens. Both forms run batches of the same size on one thread. FLOP are counted
from the tokens that each form has to run: two a weight and token, and attention.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from persona_text import SHARED, read_jsonl
from torch import Tensor

from persona_pruner.backbone.forward import pad_rows
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.backbone.prompts import persona_prefix, question_suffix
from persona_pruner.config.load import check_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.sensitivity import Sensitivity

REFERENCES = 9
TOKENS = 220


def configuration(path: str) -> RunConfig:
    return check_config({"backbone": {"path": path}, "synthesis": {"references": {"count": REFERENCES}}})


def long_personas(backbone: Backbone, count: int) -> list[Persona]:
    """Personas of about 220 tokens, made of those of the data."""
    lines = (SHARED / "personas_many.jsonl").read_text(encoding="utf-8").splitlines()
    texts = (json.loads(line)["description"] for line in lines)
    made = []
    while len(made) < count:
        tokens: list[int] = []
        while len(tokens) < TOKENS:
            tokens += backbone.tokenizer(next(texts) + " ", add_special_tokens=False)["input_ids"]
        made.append(Persona(f"p{len(made)}", backbone.tokenizer.decode(tokens[:TOKENS])))
    return made


class Pairwise:
    """s(q; P*) as published: whole prompts, of the target and of every reference, for every target."""

    def __init__(self, backbone: Backbone, config: RunConfig, questions: list[str]) -> None:
        self.backbone, self.config, self.questions = backbone, config, questions
        self.layers = next(m for m in backbone.model.modules() if isinstance(m, torch.nn.ModuleList))
        self.tokens: list[int] = []

    def states(self, persona: Persona) -> Tensor:
        """Hidden states [L, Q, D] at the last prompt token."""
        prompt, tokenizer = self.config.prompt, self.backbone.tokenizer
        prefix = persona_prefix(tokenizer, prompt, persona.description)
        rows = [prefix + question_suffix(tokenizer, prompt, persona.description, q) for q in self.questions]
        self.tokens += map(len, rows)
        size, parts = self.config.synthesis.tile_questions, []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            last = torch.tensor([len(row) - 1 for row in part])
            kept: list[Tensor] = []

            def keep(module: object, inputs: object, output: Tensor, kept: list = kept, last: Tensor = last) -> None:
                kept.append(output[torch.arange(len(last)), last])

            hooks = [layer.register_forward_hook(keep) for layer in self.layers]
            self.backbone.model.base_model(pad_rows(part, 0), use_cache=False)  # type: ignore[operator, union-attr]
            for hook in hooks:
                hook.remove()
            parts.append(torch.stack(kept))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def scores(self, target: Persona, references: list[Persona]) -> Tensor:
        own = self.states(target)
        return torch.stack([1 - torch.cosine_similarity(self.states(r), own, dim=-1) for r in references]).mean((0, 1))


def flop(backbone: Backbone, run: int, seen: float) -> float:
    """FLOP of `run` tokens that look at `seen` tokens each, without the vocabulary's matrices."""
    config = backbone.model.config
    embeddings = {id(p) for m in backbone.model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    weights = sum(p.numel() for p in backbone.model.parameters() if id(p) not in embeddings and p.dim() == 2)
    return run * (2 * weights + 4 * config.num_hidden_layers * config.hidden_size * seen)


def timed(run: Callable[[], object], repeats: int) -> list[float]:
    taken = []
    for _ in range(repeats):
        before = time.perf_counter()
        run()
        taken.append(time.perf_counter() - before)
    return taken


def matmul_rate() -> float:
    """FLOP a second of a large product on this thread."""
    one, other = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / statistics.median(timed(lambda: one @ other, 9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backbone", default="../shared/data/backbone")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = configuration(options.backbone)
    backbone = load_backbone(config.backbone, deepspeed=False)
    sizes, repeats = ((1, 2), 1) if options.quick else ((1, 8, 64), options.repeats)
    count = 8 if options.quick else options.questions
    questions = [a["instruction"] for a in read_jsonl("alpaca.jsonl.gz") if not a["input"]][:count]
    everyone = long_personas(backbone, sizes[-1] + REFERENCES)
    references, targets = everyone[:REFERENCES], everyone[REFERENCES:]
    pairwise = Pairwise(backbone, config, questions)
    tiles = Sensitivity(backbone, config, questions, references)
    rate = matmul_rate()
    plain = pairwise.scores(targets[0], references)
    ((_, tiled),) = tiles.tile(targets[:1])
    assert isinstance(tiled, Tensor)
    result = {"max_difference": (plain - tiled).abs().max().item()}
    behind = sum(len(suffix) for suffix in tiles.suffixes(targets[0].description))
    run = sum(pairwise.tokens) / (REFERENCES + 1)
    print(f"{count} questions of {behind / count:.0f} tokens behind {run / count - behind / count:.0f}; largest "
          f"difference of scores {result['max_difference']:.1e}; matmul rate {rate / 1e9:.0f} GFLOP/s")  # fmt: skip
    whole = run / count
    theirs: list[float] = []
    ours: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        theirs += timed(lambda: pairwise.scores(targets[0], references), 1)
        for size in sizes:
            ours[size] += timed(lambda: list(tiles.tile(targets[:size])), 1)  # noqa: B023
    pair, need = statistics.median(theirs) / count, flop(backbone, (REFERENCES + 1) * int(whole), whole / 2)
    print(f"pairwise: {pair * 1e3:.2f} ms a pair, {need / pair / rate:.0%} of the matmul rate")
    for size in sizes:
        tile = statistics.median(ours[size]) / count / size
        prefixes = size * flop(backbone, int(whole - behind / count), whole / 2)
        share = ((size + REFERENCES) * flop(backbone, behind, whole) + prefixes) / size / count / tile / rate
        ratios = sorted(a * size / b for a, b in zip(theirs, ours[size], strict=True))
        result[f"ratio_{size}"] = round(pair / tile, 1)
        print(f"{size:3} personas in tiles: {tile * 1e3:7.3f} ms a pair, {share:.0%} of the matmul rate: "
              f"{pair / tile:.1f} times as fast ({ratios[0]:.1f} to {ratios[-1]:.1f})", flush=True)  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
