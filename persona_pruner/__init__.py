"""One FFN-channel mask per persona on one frozen, shared LLM."""

from typing import Any

__all__ = ["Mask", "MaskStore"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds: only whoever uses a mask pays for it.
    if name == "MaskStore":
        from persona_pruner.masks.store import MaskStore

        return MaskStore
    if name == "Mask":
        from persona_pruner.masks.format import Mask

        return Mask
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
