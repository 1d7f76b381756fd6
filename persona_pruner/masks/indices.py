"""Index files of the published code: for each layer the numbers of the channels that are kept.

Its exporter reads a torch file with one int64 tensor [layers, kept]; its other tools leave [1, layers, kept], lists,
int32, a dictionary with `topk_indices`, and JSON. Shapes: L layers, I FFN channels.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from persona_pruner.errors import MaskError

_KEY = "topk_indices"


def load_keep_indices(path: str | Path, channels: int) -> Tensor:
    """bool [L, channels] of an index file in any of its forms. Raises MaskError. Never executes what a file holds."""
    value = _read(Path(path))
    if isinstance(value, dict):
        if _KEY not in value:
            raise MaskError(f"{path}: has no {_KEY!r}; it must hold the kept channels of each layer")
        value = value[_KEY]
    layers = list(value) if isinstance(value, list | tuple | Tensor) and _dims(value) else []
    if len(layers) == 1 and _dims(layers[0]) == 2:
        layers = list(layers[0])
    if not layers:
        raise MaskError(f"{path}: must hold the kept channels of each layer: integers [layers, kept]")
    keep_LI = torch.zeros(len(layers), channels, dtype=torch.bool)
    for layer, (row_I, kept) in enumerate(zip(keep_LI, layers, strict=True)):
        _mark(row_I, kept, f"{path}: layer {layer}")
    return keep_LI


def _read(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MaskError(f"{path}: cannot be read: {error.strerror}") from None
    if data.lstrip()[:1] in (b"[", b"{"):
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise MaskError(f"{path}: not an index file: broken JSON") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # torch's own message advises to load the file unsafely
        raise MaskError(
            f"{path}: not an index file: it must hold tensors, lists and dictionaries only, saved by torch.save or JSON"
        ) from None


def _dims(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.dim()
    return 1 + _dims(value[0]) if isinstance(value, list | tuple) and value else int(isinstance(value, list | tuple))


def _mark(row_I: Tensor, kept: Any, where: str) -> None:
    """Set the channels `kept` of one layer."""
    values = kept.tolist() if isinstance(kept, Tensor) else kept
    if not isinstance(values, list | tuple) or not all(type(value) is int for value in values):
        raise MaskError(f"{where}: must be a list of integers")
    if not all(0 <= value < len(row_I) for value in values):
        raise MaskError(f"{where}: an index is outside 0..{len(row_I) - 1}")
    if len(set(values)) < len(values):
        raise MaskError(f"{where}: names the same channel twice")
    row_I[list(values)] = True
