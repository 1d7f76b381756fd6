"""What one machine is like, seen from a process there: `persona-pruner doctor` asks every node of a cluster."""

import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import UserError

PACKAGES = ("persona-pruner", "ray", "torch", "transformers", "deepspeed", "safetensors")
"""What must be the same everywhere: code of one version does not read what another one sends."""


def node_facts(backbone: Mapping[str, Any] | None, output: str | None) -> dict[str, Any]:
    """Plain values only: they travel to a process that may have other versions of everything."""
    # Ray hides the GPUs from a task that asks for none.
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        del os.environ["CUDA_VISIBLE_DEVICES"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "gpus": _gpus(),
        "shared_memory": _total("/dev/shm"),
        "compiler": shutil.which(os.environ.get("CXX", "g++")),
        "operators": _operators(),
        "disks": {str(directory): _disk(directory) for directory in (cache, Path("/tmp"))},
        "backbone": _backbone(backbone) if backbone else None,
        "output": _output(output) if output else None,
    }


def clock() -> float:
    """Unix seconds."""
    return time.time()


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _total(path: str) -> int:
    try:
        return shutil.disk_usage(path).total
    except OSError:
        return 0


def _operators() -> bool:
    from persona_pruner.backbone.operator import is_compiled

    return is_compiled()


def _disk(path: Path) -> dict[str, int]:
    while not path.exists():
        path = path.parent
    usage = shutil.disk_usage(path)
    return {"free": usage.free, "total": usage.total}


def _backbone(settings: Mapping[str, Any]) -> dict[str, str]:
    from persona_pruner.backbone.files import fingerprint, resolve

    try:
        return {"fingerprint": fingerprint(resolve(BackboneConfig.model_validate(settings)))}
    except UserError as error:
        return {"fault": str(error)}


def _output(url: str) -> dict[str, str]:
    from persona_pruner.storage.open import AT_START, open_storage

    try:
        open_storage(url, AT_START).check_writable()
    except UserError as error:
        return {"fault": str(error)}
    return {}
