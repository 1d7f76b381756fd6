"""The files of a backbone: where they are, what is wrong with a name, and a fingerprint of the weights."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import local_copy

if TYPE_CHECKING:
    # Seconds to import, and a wrong name is told without it.
    from torch import nn

_FINGERPRINT = "_backbone_fingerprint"
RECOVERED = "recovered.json"
"""Beside the weights of a backbone that was mended for the masks of another: the fingerprint of that one."""
_WHERE = "give a local directory, an s3:// prefix or a Hugging Face name"


def resolve(config: BackboneConfig, *, weights: bool = True) -> Path:
    """Local directory of the backbone; an s3:// prefix or a hub name is copied first. Raises BackboneError.

    `weights=False` fetches of a hub name only the configuration and the tokenizer.
    """
    if not config.path:
        raise BackboneError(f"backbone.path is not set; {_WHERE}")
    if config.path.startswith("s3://"):
        try:
            path = local_copy(config.path)
        except NotFoundError as error:
            raise BackboneError(f"backbone.path = {error}") from None
    else:
        path = Path(config.path)
        if not path.exists() and not path.is_absolute() and config.path.count("/") <= 1 and config.path[0] != ".":
            path = _from_hub(config, weights)
    if not (path / "config.json").is_file():
        raise BackboneError(f"backbone.path = {config.path}: no model there (config.json missing); {_WHERE}")
    return path


def _from_hub(config: BackboneConfig, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns: dict[str, Any] = {"ignore_patterns": ["*.bin", "*.pt", "*.gguf"]}
    if not weights:
        patterns["allow_patterns"] = ["*.json", "*.jinja", "*.model", "*.txt", "*.py"]
    try:
        return Path(snapshot_download(config.path, revision=config.revision, **patterns))
    except Exception as error:
        raise BackboneError(f"backbone.path = {config.path}: {_explain_hub(config, error)}") from None


def _explain_hub(config: BackboneConfig, error: Exception) -> str:
    """Why a hub name cannot be fetched, and what to do. Each cause wants another remedy."""
    from huggingface_hub import errors

    cause = error.__cause__ or error.__context__ or error
    for known in (error, cause):
        if isinstance(known, errors.GatedRepoError):
            return "a gated model on the hub: accept its terms on its page, then `hf auth login` or set HF_TOKEN"
        if isinstance(known, errors.RevisionNotFoundError):
            return f"is on the hub, but has no revision {config.revision!r} (backbone.revision)"
        if isinstance(known, errors.RepositoryNotFoundError):
            return "neither a local directory nor a model on the hub; check the name (a private model needs HF_TOKEN)"
        if isinstance(known, errors.HFValidationError):
            return f"neither a local directory nor a valid hub name; {_WHERE}"
        if isinstance(known, errors.HfHubHTTPError) and known.response is not None:
            return f"the hub answered HTTP {known.response.status_code}; try again, or give a local directory"
    return (
        "no such local directory, and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set) "
        "and has not been fetched from before; copy the model here and give its directory"
    )


def fingerprint(path: str | Path) -> str:
    """sha256 (hex) over names, types, shapes and bytes of all weights, however they are split into files.

    Configuration and tokenizer do not enter: they are rewritten by every release of the libraries. A backbone that was
    mended for its masks keeps the fingerprint under which they were made.
    """
    recovered = Path(path) / RECOVERED
    if recovered.is_file():
        return str(json.loads(recovered.read_text(encoding="utf-8"))["fingerprint"])
    import torch
    from safetensors import safe_open

    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise BackboneError(f"{path}: no *.safetensors weights; convert the model to safetensors")
    file_of: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                file_of.update(dict.fromkeys(tensors.keys(), file))
        except Exception as error:
            raise BackboneError(f"{file}: not a readable safetensors file ({error})") from None
    digest = hashlib.sha256()
    handles = {file: safe_open(file, framework="pt") for file in files}
    for name in sorted(file_of):
        tensor = handles[file_of[name]].get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def mark_fingerprint(model: "nn.Module", value: str) -> None:
    """Let a loaded model carry the fingerprint of its files."""
    object.__setattr__(model, _FINGERPRINT, value)


def fingerprint_of(model: Any) -> str | None:
    """Fingerprint of the files that a transformers model was loaded from; None where it was not loaded from files.

    The files are read once per model.
    """
    known = getattr(model, _FINGERPRINT, None)
    if known is None:
        path = _loaded_from(model.config)
        if path is None:
            return None
        known = fingerprint(path)
        mark_fingerprint(model, known)
    return str(known)


def _loaded_from(config: Any) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = getattr(config, "_name_or_path", "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None
