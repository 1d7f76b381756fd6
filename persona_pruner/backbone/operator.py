"""The C++ operator that DeepSpeed uses between processes on CPUs: compiled once, shared by all jobs of a machine."""

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_NAME = "deepspeed_shm_comm"


def cache_directory() -> Path:
    """Where the compiled operator lies. One directory for each set of versions, not for each environment: where Ray
    makes an environment for every job, they would all compile it again."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    versions = (platform.python_version(), torch.__version__, importlib.metadata.version("deepspeed"))
    key = hashlib.sha256(" ".join((*versions, platform.machine(), *platform.libc_ver())).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persona-pruner"
    return cache / f"operators-{key}"


def is_compiled() -> bool:
    """Whether `load_operator` will find the operator. Imports nothing, so that a job can ask before it starts."""
    return _done(cache_directory()).exists()


def compile_operator(tell: Callable[[str], None]) -> None:
    """Compile the operator now, in a process of its own, where this machine needs it and has not done so yet; `tell`
    gets a line before. Whoever loads it later does not wait. Where it fails, that loading says why."""
    if torch.cuda.is_available() or is_compiled():
        return
    tell("compiling DeepSpeed's operator for CPUs, once on this machine")
    subprocess.run([sys.executable, "-m", __name__], capture_output=True, check=False)


def load_operator() -> None:
    """Load the operator into DeepSpeed, compiled first where no process of this machine has done so.

    torch guards a compilation by a file that outlives a killed process and then stops everybody for ever. Our lock dies
    with its holder, and whoever holds it clears what a dead one has left. What has been compiled is loaded as it is:
    ninja would compile it again for each environment, since the paths in its command differ.
    """
    from deepspeed.accelerator import get_accelerator
    from torch.utils.cpp_extension import _import_module_from_library

    builder: Any = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    directory = cache_directory()
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(directory))
    # An image brings the operator in a directory that nobody can write.
    if not _done(directory).exists():
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "builder").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not _done(directory).exists():
                for lock in directory.glob("**/lock"):
                    lock.unlink(missing_ok=True)
                _ninja_on_path()
                builder.load()
                _done(directory).touch()
    loaded = type(builder)._loaded_ops
    if builder.name not in loaded:
        loaded[builder.name] = _import_module_from_library(_NAME, str(directory / _NAME), True)


def _done(directory: Path) -> Path:
    return directory / _NAME / "compiled"


def _ninja_on_path() -> None:
    """An environment that is not activated has ninja beside Python and not on PATH."""
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"


if __name__ == "__main__":
    load_operator()
