"""Losses of every answer token under several masks, and the tables that compare them over personas.

Shapes: L layers, I FFN channels, N answer tokens of a row.
"""

import hashlib
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from persona_text import Speaker
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone
from persona_pruner.backbone.prompts import persona_prefix
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import Row
from persona_pruner.learning.batches import MicroBatchConfig
from persona_pruner.learning.encoding import encode_rows
from persona_pruner.learning.persona_tokens import NOBODY, decided_tokens, token_losses

PUBLISHED = "activation, generic"
FREE_OF_TRAINING = (PUBLISHED, "activation, own", "fisher, own, uniform", "fisher, own, free")
MENDED = "own, mended backbone"
RIVALS = {"pooled, further steps": "global", "other": "other"}


class TokenLosses:
    """Loss of every answer token under a mask, by row; kept on disk by the mask's bits."""

    def __init__(self, backbone: Backbone, config: RunConfig, cache: Path) -> None:
        self.backbone, self.config, self.cache = backbone, config, cache
        cache.mkdir(exist_ok=True)

    def of(self, who: Speaker, text: str, keep_LI: Tensor | None, description: str | None = None) -> list[Tensor]:
        bits = b"" if keep_LI is None else keep_LI.numpy().tobytes()
        key = hashlib.sha256(bits + (description or "").encode()).hexdigest()[:16]
        file = self.cache / f"losses-{who.id}-{text}-{key}.safetensors"
        if not file.exists():
            rows_N = self._measure(who.texts[text], description or who.data.description, keep_LI)
            save_file({f"{number:04d}": row_N for number, row_N in enumerate(rows_N)}, file)
        return [row_N for _, row_N in sorted(load_file(file).items())]

    def _measure(self, rows: Sequence[Row], description: str, keep_LI: Tensor | None) -> list[Tensor]:
        config, backbone = self.config, self.backbone
        prefix = persona_prefix(backbone.tokenizer, config.prompt, description)
        encoded = encode_rows(backbone.tokenizer, config.prompt, description, rows, config.learning.max_row_tokens)
        with BackboneRunner(backbone) as runner:
            losses = token_losses(runner, prefix, encoded, keep_LI, MicroBatchConfig.of(config, backbone.device))
        return [row_N.clone() for row_N in losses]


def difference(better: Sequence[Tensor], worse: Sequence[Tensor], chosen: Sequence[Tensor]) -> tuple[float, float]:
    """Mean of worse - better over the chosen tokens, and its standard error over rows."""
    sums = torch.tensor([float((w - b)[c].sum()) for b, w, c in zip(better, worse, chosen, strict=True)])
    tokens = torch.tensor([float(c.sum()) for c in chosen])
    mean = sums.sum() / tokens.sum()
    rows = len(sums)
    error = ((sums - mean * tokens).square().sum() * rows / (rows - 1)).sqrt() / tokens.sum()
    return float(mean), float(error)


def compare(
    people: Sequence[Speaker],
    masks: dict[str, dict[str, Tensor]],
    losses: TokenLosses,
    ratio: float,
    mended: TokenLosses | None = None,
) -> dict[str, float]:
    """Print the tables of one ratio; the figures for the last line.

    `masks`: bits by method and persona; `mended`: losses of the mended backbone.
    """
    figures: dict[str, float] = {}
    percent = round(100 * ratio)
    beaten = {who.id: True for who in people}
    for text, real in (("answers", False), ("conversations", True)):
        by_method = {"unpruned": [losses.of(who, text, None) for who in people]}
        for method, keeps in masks.items():
            by_method[method] = [losses.of(who, text, keeps[who.id]) for who in people]
        if mended is not None:
            by_method[MENDED] = [mended.of(who, text, masks["own"][who.id]) for who in people]
        nobody = [losses.of(who, text, None, NOBODY) for who in people]
        every = [[torch.ones_like(row_N, dtype=torch.bool) for row_N in rows] for rows in nobody]
        tenth = [_tenth(told, untold) for told, untold in zip(by_method["unpruned"], nobody, strict=True)]
        print(f"\nratio {ratio}, {text}: mean over personas, nats per token")
        removed = _table(by_method, every, tenth)
        for method, name in (("own", ""), (MENDED, "mended_")):
            if method in removed:
                figures[f"removed_{'real' if real else 'answers'}_{name}{percent}"] = removed[method]
        for rival, name in RIVALS.items():
            for scope, chosen in (("all", every), ("persona", tenth)):
                gain, error, wins = _paired(by_method["own"], by_method[rival], chosen, f"{rival} ({scope} tokens)")
                named = f"{name}_{text}_{scope}_{percent}"
                figures |= {f"wins_{named}": wins, f"gain_{named}": gain, f"gain_error_{named}": error}
                if real and scope == "all":
                    figures[f"own_beats_{name}_{percent}"] = wins
        for number, who in enumerate(people):
            own = torch.cat(by_method["own"][number]).mean()
            rivals = [torch.cat(by_method[method][number]).mean() for method in FREE_OF_TRAINING]
            beaten[who.id] &= bool(own < min(rivals))
    figures[f"own_beats_training_free_{percent}"] = sum(beaten.values())
    return figures


def _table(
    by_method: dict[str, list[list[Tensor]]], every: list[list[Tensor]], tenth: list[list[Tensor]]
) -> dict[str, float]:
    """Print mean losses; the share of the published baseline's increase that each method removes."""
    means = {method: [_mean(rows, chosen) for chosen in (every, tenth)] for method, rows in by_method.items()}
    unpruned, published = means["unpruned"][0], means[PUBLISHED][0]
    increase = published - unpruned if published > unpruned else math.nan
    removed = {method: 1 - (all_ - unpruned) / increase for method, (all_, _) in means.items()}
    print(f"{'':<24}{'all':>8}{'persona':>9}{'removed':>9}")
    for method, (all_, persona) in means.items():
        print(f"{method:<24}{all_:>8.3f}{persona:>9.3f}{removed[method]:>9.1%}")
    return removed


def _paired(
    own: list[list[Tensor]], rival: list[list[Tensor]], chosen: list[list[Tensor]], told: str
) -> tuple[float, float, int]:
    """Mean gain over personas, its standard error, and for how many of them own is better."""
    pairs = [difference(*each) for each in zip(own, rival, chosen, strict=True)]
    mean, error = _mean_error([gain for gain, _ in pairs])
    wins, clear = sum(gain > 0 for gain, _ in pairs), sum(gain > 2 * error for gain, error in pairs)
    each = " ".join(f"{gain:+.3f}±{error:.3f}" for gain, error in pairs)
    print(f"own better than {told}: {mean:+.4f} ± {error:.4f}, {wins} of {len(pairs)}, "
          f"{clear} by two standard errors of their rows: {each}")  # fmt: skip
    return mean, error, wins


def _tenth(told: Sequence[Tensor], untold: Sequence[Tensor]) -> list[Tensor]:
    return decided_tokens([(a - b).abs() for a, b in zip(told, untold, strict=True)])


def _mean(people: Sequence[Sequence[Tensor]], chosen: Sequence[Sequence[Tensor]]) -> float:
    """Mean over personas of the mean over their chosen tokens."""
    return statistics.mean(
        float(torch.cat([row_N[c] for row_N, c in zip(rows, some, strict=True)]).mean())
        for rows, some in zip(people, chosen, strict=True)
    )


def _mean_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error
