"""The frozen model: found, fingerprinted, loaded whole or as one shard of a DeepSpeed ZeRO-3 world.

The only module that imports deepspeed. One process holds at most one world.
"""

import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from persona_pruner.backbone import attention
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import local_copy

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class World:
    """One process of a shard group. `address` is host:port of rank 0, the same for all ranks."""

    rank: int = 0
    size: int = 1
    address: str = ""
    timeout_seconds: float = 600.0


@dataclass
class Backbone:
    """A loaded model. `model` is frozen and in eval mode; with world.size > 1 its parameters are partitioned."""

    model: nn.Module
    tokenizer: Any
    name: str
    fingerprint: str
    device: torch.device
    world: World
    path: Path
    _alive: list[Any] = field(default_factory=list, repr=False)

    @property
    def sharded(self) -> bool:
        return self.world.size > 1

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, by rank. Raises as `all_reduce` does."""
        found = [value] * self.world.size
        if self.sharded:
            dist.all_gather_object(found, value)
        return found

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place. Raises RuntimeError when a rank is gone or silent for the world's timeout."""
        if self.sharded:
            dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def gathered_parameters(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Make partitioned parameters readable in full inside; every rank enters at the same time."""
        if not self.sharded:
            yield
            return
        import deepspeed as ds

        with ds.zero.GatheredParameters(list(parameters), modifier_rank=None):
            yield

    def enter(self, run: Callable[[], Any]) -> Any:
        """Call `run` below the root that DeepSpeed watches, so that its record of parameter use restarts."""
        return self._alive[0](run) if self.sharded else run()


class _Root(nn.Module):
    """What DeepSpeed wraps. Body and head of the model are run apart, which the model's own forward does not allow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def resolve(config: BackboneConfig) -> Path:
    """Local directory of the backbone; an s3:// prefix or a hub name is copied first. Raises BackboneError."""
    if not config.path:
        raise BackboneError("backbone.path is not set; give a local directory, an s3:// prefix or a Hugging Face name")
    if config.path.startswith("s3://"):
        try:
            path = local_copy(config.path)
        except NotFoundError as error:
            raise BackboneError(f"backbone.path = {error}") from None
    else:
        path = Path(config.path)
        if not path.exists() and not path.is_absolute() and config.path.count("/") <= 1 and config.path[0] != ".":
            path = _from_hub(config)
    if not (path / "config.json").is_file():
        raise BackboneError(
            f"backbone.path = {config.path}: no model there (config.json missing); "
            "give a local directory, an s3:// prefix or a Hugging Face name"
        )
    return path


def _from_hub(config: BackboneConfig) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(config.path, revision=config.revision, ignore_patterns=["*.bin", "*.pt", "*.gguf"])
        )
    except Exception as error:
        raise BackboneError(
            f"backbone.path = {config.path}: neither a local directory nor a hub model that can be fetched "
            f"({type(error).__name__})"
        ) from None


def fingerprint(path: str | Path) -> str:
    """sha256 (hex) over names, types, shapes and bytes of all weights, however they are split into files.

    Configuration and tokenizer do not enter: they are rewritten by every release of the libraries.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise BackboneError(f"{path}: no *.safetensors weights; convert the model to safetensors")
    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                where.update(dict.fromkeys(tensors.keys(), file))
        except Exception as error:
            raise BackboneError(f"{file}: not a readable safetensors file ({error})") from None
    digest = hashlib.sha256()
    handles = {file: safe_open(file, framework="pt") for file in files}
    for name in sorted(where):
        tensor = handles[where[name]].get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def load_backbone(
    config: BackboneConfig,
    world: World | None = None,
    *,
    deepspeed: bool = True,
    device: torch.device | str | None = None,
) -> Backbone:
    """Load the model frozen and in eval mode. Every rank of a world calls this at the same time.

    One process: initialized by DeepSpeed without partitioning, or left plain with `deepspeed=False`. Several: ZeRO-3,
    each rank holds 1/size of every parameter and only rank 0 reads the weights. Raises BackboneError.
    """
    world = world or World()
    path = resolve(config)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    mark = fingerprint(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        model, alive = _load(config, path, world, deepspeed, place)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BackboneError(f"backbone.path = {config.path}: cannot be loaded: {str(error).splitlines()[0]}") from None
    name = config.path if "/" not in config.path.strip("/") or not path.is_absolute() else path.name
    return Backbone(model, tokenizer, Path(name).name, mark, place, world, path, alive)


def _load(
    config: BackboneConfig, path: Path, world: World, deepspeed: bool, device: torch.device
) -> tuple[nn.Module, list[Any]]:
    auto = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    # Looked up before zero.Init is active: that patches tensor construction, and a lazy import inside it fails.
    kind = AutoModelForCausalLM._model_mapping.get(type(auto), None)
    attention.register()
    sdpa_missing = config.attention == "sdpa" and not getattr(kind, "_supports_sdpa", True)  # Gemma 2
    options = {
        "dtype": _DTYPES[config.dtype],
        "attn_implementation": "eager" if sdpa_missing else config.attention,
        "trust_remote_code": config.trust_remote_code,
        "use_safetensors": True,
    }
    if not deepspeed and world.size == 1:
        return _freeze(AutoModelForCausalLM.from_pretrained(path, **options)).to(device), []
    _join(world, device)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": world.size > 1 and config.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0} if world.size > 1 else {"stage": 0},
    }
    keeper = _partition_on_load(settings) if world.size > 1 else None
    model = _freeze(AutoModelForCausalLM.from_pretrained(path, **options))
    if world.size == 1:
        model = model.to(device)
    import deepspeed as ds

    engine, *_ = ds.initialize(model=_Root(model), config=settings)
    return engine.module.inner, [engine.module, engine, keeper]


def _partition_on_load(settings: dict[str, Any]) -> Any:
    """Make from_pretrained create partitioned parameters for as long as the returned object lives."""
    import torch._dynamo  # noqa: F401  (a lazy import inside zero.Init fails)
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(settings)


def _join(world: World, device: torch.device) -> None:
    """Make this process a rank of the world. A second backbone in one process must be of the same world."""
    if dist.is_initialized():
        if (dist.get_world_size(), dist.get_rank()) != (world.size, world.rank):
            raise BackboneError(f"this process is rank {dist.get_rank()} of {dist.get_world_size()} already")
    else:
        address = world.address or f"127.0.0.1:{free_port()}"
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{address}",
            rank=world.rank,
            world_size=world.size,
            timeout=datetime.timedelta(seconds=world.timeout_seconds),
        )
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        _build_operator()
    import deepspeed as ds

    ds.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _build_operator() -> None:
    """Compile the operator that DeepSpeed uses on CPUs, one process of this machine at a time.

    torch guards a compilation by a file that outlives a killed process and then stops everybody for ever. Our lock dies
    with its holder, and who holds it clears what a dead one has left. The directory belongs to this environment, since
    another one's compiler output does not fit.
    """
    from deepspeed.accelerator import get_accelerator

    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        # An environment that is not activated has ninja beside Python and not on PATH.
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    mark = hashlib.sha256(f"{sys.prefix}{torch.__version__}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "persona-pruner"
    directory = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache / f"operators-{mark}")))
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "builder").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for left in directory.glob("**/lock"):
            left.unlink(missing_ok=True)
        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None and builder.is_compatible():
            builder.load()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens at now; "" for all of this machine's addresses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _freeze(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def describe(path: Path) -> dict[str, Any]:
    """The model's config.json."""
    return dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
