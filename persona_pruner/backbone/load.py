"""The frozen model, loaded whole or as one shard of a DeepSpeed ZeRO-3 world. One process holds at most one world."""

import contextlib
import datetime
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from persona_pruner.backbone import attention
from persona_pruner.backbone.compact import ffn_widths, load_checkpoint
from persona_pruner.backbone.files import fingerprint, mark_fingerprint, resolve
from persona_pruner.backbone.operator import load_operator
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError

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
        values = [value] * self.world.size
        if self.sharded:
            dist.all_gather_object(values, value)
        return values

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
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights_sha256 = fingerprint(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        model, alive = _load(config, path, world, deepspeed, target)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BackboneError(f"backbone.path = {config.path}: cannot be loaded: {str(error).splitlines()[0]}") from None
    name = config.path if "/" not in config.path.strip("/") or not path.is_absolute() else path.name
    mark_fingerprint(model, weights_sha256)
    return Backbone(model, tokenizer, Path(name).name, weights_sha256, target, world, path, alive)


def _load(
    config: BackboneConfig, path: Path, world: World, deepspeed: bool, device: torch.device
) -> tuple[nn.Module, list[Any]]:
    auto = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    if world.size > 1 and ffn_widths(auto) is not None:
        raise BackboneError(
            f"backbone.path = {config.path}: a compact checkpoint (ffn_widths in its config.json) runs in one process; "
            "set shards to 1, or export it without --compact"
        )
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
        return _freeze(load_checkpoint(path, **options)).to(device), []
    _join(world, device)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": world.size > 1 and config.dtype == "bfloat16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0} if world.size > 1 else {"stage": 0},
    }
    keeper = _partition_on_load(settings) if world.size > 1 else None
    model = _freeze(load_checkpoint(path, **options))
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
        load_operator()
    import deepspeed as ds

    ds.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens at now; "" for all of this machine's addresses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _freeze(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()
