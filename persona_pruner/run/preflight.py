"""What can be refused before anything is paid for: from the configuration, the tokenizer, the model's configuration and
the first row of each source. Loads no weights and writes nothing into the output."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import BackboneError, ConfigError

_PROBE = ("A person.", "Why?")


@dataclass(frozen=True)
class NodeGpus:
    """GPUs of one node of the largest kind. `final`: no larger kind of node can join."""

    most: float
    final: bool


def preflight(config: RunConfig, *, synthesis: bool = True, nodes: NodeGpus | None = None) -> None:
    """Refuse a run that cannot end well: raises BackboneError, SourceError, ConfigError within seconds, one line each.

    `synthesis`: whether questions will be read. `nodes`: what is known about GPUs; None checks none.
    """
    from persona_pruner.backbone.files import resolve

    if nodes is not None:
        check_gpus(config, nodes)
    path = resolve(config.backbone, weights=False)
    _check_not_quantised(config, path)
    if synthesis:
        from persona_pruner.synthesis.sources import check_columns

        for source in config.synthesis.sources:
            check_columns(source)
    check_backbone(config, path)


def preflight_before_submission(config: RunConfig) -> None:
    """The checks of `preflight` on whatever lies on this machine too; the job does all of them where it runs."""
    if Path(config.backbone.path).is_dir():
        check_backbone(config, Path(config.backbone.path))
    from persona_pruner.synthesis.sources import check_columns

    for source in config.synthesis.sources:
        if Path(source.path).exists():
            check_columns(source)


def check_backbone(config: RunConfig, path: Path) -> None:
    """Raise BackboneError where the model in `path` cannot be prompted, masked, or, if that is asked for, exported."""
    _check_not_quantised(config, path)
    where = f"backbone.path = {config.backbone.path}"
    _check_prompts(config, path, where)
    from persona_pruner.backbone.channels import ChannelMasks
    from persona_pruner.backbone.export import export_refusal

    model_config, model = _without_weights(config, path, where)
    try:
        ChannelMasks(model)
    except BackboneError as error:
        raise BackboneError(f"{where}: {error}") from None
    refusal = export_refusal(model_config) if config.backbone.exportable else None
    if refusal is not None:
        raise BackboneError(
            f"{where}: its masks could not be exported: {refusal}; set backbone.exportable to false to make masks that "
            "are only applied to the backbone"
        )


def _check_prompts(config: RunConfig, path: Path, where: str) -> None:
    from transformers import AutoTokenizer

    from persona_pruner.backbone.prompts import answer_tokens, persona_prefix, question_suffix

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.backbone.trust_remote_code)
    except Exception as error:
        raise BackboneError(f"{where}: its tokenizer cannot be loaded: {_first_line(error)}") from None
    try:
        persona_prefix(tokenizer, config.prompt, _PROBE[0])
        question_suffix(tokenizer, config.prompt, *_PROBE)
        answer_tokens(tokenizer, "Because.")
    except BackboneError as error:
        raise BackboneError(f"{where}: {error}") from None


def _check_not_quantised(config: RunConfig, path: Path) -> None:
    values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    quantisation = values.get("quantization_config") or values.get("text_config", {}).get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        where = f"backbone.path = {config.backbone.path}"
        raise BackboneError(f"{where}: quantised checkpoints ({method}) are not supported; take the original")


def _without_weights(config: RunConfig, path: Path, where: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"trust_remote_code": config.backbone.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(path, **options)
        with torch.device("meta"):
            return model_config, AutoModelForCausalLM.from_config(model_config, **options)
    except Exception as error:
        raise BackboneError(f"{where}: not a causal language model of transformers: {_first_line(error)}") from None


def check_gpus(config: RunConfig, nodes: NodeGpus) -> None:
    """Raise ConfigError where an actor asks for more GPUs than any node can have: it would wait for ever."""
    for name, actors in (("groups", config.group_pool), ("synthesis.actors", config.synthesis.actors)):
        if nodes.final and actors.num_gpus > nodes.most:
            raise ConfigError(
                f"{name}.num_gpus = {actors.num_gpus:g}: no node has more than {nodes.most:g} GPUs; lower it, "
                f"and raise {name}.shards where the model does not fit"
            )


def gpus_of_nodes(config: RunConfig) -> NodeGpus | None:
    """GPUs of this machine, or of the nodes of the cluster that this job was submitted to (RAY_ADDRESS).

    None where no actor asks for a GPU. A node of a kind that is not up may join a cluster later, so the answer is
    final only where the autoscaler tells all kinds of nodes, or where nodes with GPUs are up and nothing adds others.
    """
    if not (config.group_pool.num_gpus or config.synthesis.actors.num_gpus):
        return None
    if not os.environ.get("RAY_ADDRESS"):
        import torch

        return NodeGpus(torch.cuda.device_count(), final=True)
    import ray
    from ray._private import ray_constants
    from ray._private.state import state
    from ray.experimental.internal_kv import _internal_kv_get

    from persona_pruner.run.ray_cluster import connect

    if not ray.is_initialized():
        connect(config)
    up = most_gpus([node["Resources"] for node in ray.nodes() if node["Alive"]])
    cluster = state.get_cluster_config()
    kinds = [group.resources for group in cluster.node_group_configs] if cluster else []
    if kinds:
        return NodeGpus(max(up, most_gpus(kinds)), final=True)
    autoscaled = bool(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS))
    return NodeGpus(up, final=up > 0 and not autoscaled)


def most_gpus(nodes: Sequence[Mapping[str, float]]) -> float:
    return max((float(node["GPU"]) for node in nodes if "GPU" in node), default=0.0)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
