"""What answers are like as texts, without a model: how varied, how repetitive, how long."""

from collections.abc import Sequence


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al. 2016): different word n-grams over all n-grams, of all texts together; 0 without any."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, earlier: Sequence[str] = (), n: int = 4) -> float:
    """Share of a text's word n-grams that it, or an `earlier` text, has said before (seq-rep-n, Welleck et al. 2020); 0
    without any."""
    grams, said = _grams(text, n), {gram for before in earlier for gram in _grams(before, n)}
    return 1 - len(set(grams) - said) / len(grams) if grams else 0.0


def words(text: str) -> int:
    return len(text.split())


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    tokens = text.lower().split()
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
