"""Which of the scored questions a persona is trained on. Shape suffixes: Q questions."""

import hashlib
import math
import re
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from persona_pruner.config.schema import SelectConfig
from persona_pruner.synthesis.sources import Question, comparison_key


def select_questions(
    config: SelectConfig,
    questions: Sequence[Question],
    scores_Q: Tensor,
    excluded: Collection[str] = (),
    seed: str = "",
) -> list[int]:
    """Positions of the chosen questions, best first (ties: by question id). A score of NaN is never chosen.

    `excluded` holds comparison keys that must not be taken (the persona's evaluation questions). `random` draws by
    `seed`.
    """
    scores = scores_Q.tolist()
    scored = [i for i, score in enumerate(scores) if not math.isnan(score)]
    if config.method == "random":
        order = sorted(scored, key=lambda i: hashlib.sha256(f"{seed}{questions[i].id}".encode()).digest())
    else:
        order = sorted(scored, key=lambda i: (-scores[i], questions[i].id))
    floor = {
        "threshold": config.threshold,
        "quantile": torch.nanquantile(scores_Q.double(), config.quantile).item() if scored else 0.0,
    }.get(config.method)
    limit = config.k if floor is None else None
    taken: list[int] = []
    words: list[set[str]] = []
    for i in order:
        if len(taken) == limit or (floor is not None and scores[i] <= floor):
            break
        if (questions[i].key or comparison_key(questions[i].text)) in excluded:
            continue
        if config.diversity is not None:
            own = set(re.findall(r"\w+", questions[i].text.lower()))
            if any(len(own & other) > config.diversity * len(own | other) for other in words):
                continue
            words.append(own)
        taken.append(i)
    return taken
