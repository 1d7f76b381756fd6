"""The vLLM plugin (entry point `vllm.general_plugins`): one mask per request inside an engine that knows nothing of it.

vLLM calls `register` in each of its processes. Without `additional_config={"persona_slots": n}` an engine is left as it
is and refuses requests that name a mask. Four places are touched, each once:

1. `InputProcessor.process_inputs` (front end): a request's mask is checked, so that no worker dies of it, and its
   prefix cache is salted with the mask's digest, since keys and values belong to a mask.
2. `BaseModelLoader.load_model` (worker): the table and its operator are hooked before every FFN's output projection;
   where compact weights are asked for, the loaded ones are kept before the engine packs them.
3. `GPUModelRunner._model_forward` (model runner V1, the one of a CPU): the slots of the step's tokens are set.
4. `get_model_state_cls` of the loaded model (model runner V2's own hook): the same.
"""

import functools
import json
from typing import Any

import torch
from torch import nn

from persona_pruner.errors import BackboneError, MaskError
from persona_pruner.serving.channel_op import mask_channels
from persona_pruner.serving.compact import CompactFfns, keep_weights
from persona_pruner.serving.mask_table import MaskLayout, MaskTable, RequestMask, ffn_shape

SLOTS, COMPACT = "persona_slots", "persona_compact"
_OUTPUT_PROJECTIONS = ("down_proj", "dense_4h_to_h", "fc2")
"""The last linear of an FFN, as `backbone.channels` knows them."""


def register() -> None:
    """Called by vLLM, in some processes more than once."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _wrap(InputProcessor, "process_inputs", _check_and_salt)
    _wrap(BaseModelLoader, "load_model", _install_after_loading)
    _wrap(base_loader, "process_weights_after_loading", _keep_weights_before_packing)
    _wrap(GPUModelRunner, "_model_forward", _assign_slots)


def _wrap(owner: Any, name: str, around: Any) -> None:
    """Replace a method by around(original, self, ...), once per process."""
    original = getattr(owner, name)
    if getattr(original, "persona_pruner", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    method.persona_pruner = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _check_and_salt(process_inputs: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    request = process_inputs(self, *args, **kwargs)
    mask = RequestMask.find(request.sampling_params and request.sampling_params.extra_args)
    config = self.vllm_config
    if SLOTS not in config.additional_config:
        if mask:
            raise ValueError(f"a mask was asked for, and the engine was started without {SLOTS}")
        return request
    if mask:
        try:
            mask.check(*ffn_shape(config.model_config.hf_text_config))
        except MaskError as error:
            raise ValueError(str(error)) from None
    # In one string with what the client chose, so that no choice of a client names another mask's blocks.
    request.cache_salt = json.dumps([mask and mask.digest, request.cache_salt])
    return request


def _install_after_loading(load_model: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> nn.Module:
    model = load_model(self, vllm_config, *args, **kwargs)
    if SLOTS in vllm_config.additional_config:
        install(model, vllm_config)
    return model


def _keep_weights_before_packing(process: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from vllm.config import get_current_vllm_config

    if get_current_vllm_config().additional_config.get(COMPACT):
        keep_weights(model)
    return process(model, *args, **kwargs)


def _assign_slots(model_forward: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    model = self.get_model()
    if hasattr(model, "mask_table"):
        requests = self.input_batch.num_reqs
        masks = [_mask_of(self.requests[name].sampling_params) for name in self.input_batch.req_ids[:requests]]
        _begin_step(model, masks, self.query_start_loc.np[: requests + 1])
    return model_forward(self, *args, **kwargs)


def _begin_step(model: Any, masks: list[RequestMask | None], starts: Any) -> None:
    model.mask_table.assign(masks, starts)
    if model.compact_ffns:
        model.compact_ffns.choose(masks, starts)


def _mask_of(sampling_params: Any) -> RequestMask | None:
    return RequestMask.find(sampling_params and sampling_params.extra_args)


def install(model: nn.Module, vllm_config: Any) -> MaskTable:
    """Give a loaded vLLM model its table of masks. Raises BackboneError for what could answer with a wrong mask."""
    _refuse_unsupported(vllm_config)
    layers, channels = ffn_shape(vllm_config.model_config.hf_text_config)
    projections = _output_projections(model, channels)
    first = next(iter(projections.values()))
    scheduler = vllm_config.scheduler_config
    slots = int(vllm_config.additional_config[SLOTS])
    if slots < scheduler.max_num_seqs:
        raise BackboneError(
            f"{SLOTS} = {slots}: each of a step's requests may bring another mask; at least "
            f"max_num_seqs = {scheduler.max_num_seqs}"
        )
    layout = MaskLayout(
        layers=tuple(projections), total_layers=layers, channels=channels, slots=slots,
        tokens=_largest_step(vllm_config), rank=first.tp_rank, ranks=first.tp_size,
        dtype=vllm_config.model_config.dtype,
    )  # fmt: skip
    table = MaskTable(layout, vllm_config.device_config.device)
    for number, projection in enumerate(projections.values()):
        # Buffers of the module, not values in a closure: torch.compile then takes them as inputs of its graph.
        projection.register_buffer("mask_bits_SN", table.bits_LSN[number], persistent=False)
        projection.register_buffer("mask_slot_T", table.slot_T, persistent=False)
        factors_TI = None if table.factors_LTI is None else table.factors_LTI[number]
        projection.register_buffer("mask_factors_TI", factors_TI, persistent=False)
        projection.register_forward_pre_hook(_apply_masks)
    model.mask_table = table  # type: ignore[assignment]
    compact = int(vllm_config.additional_config.get(COMPACT, 0))
    model.compact_ffns = CompactFfns(model, table, compact) if compact else None  # type: ignore[assignment]
    model.get_model_state_cls = functools.partial(_model_state_class, vllm_config, model)  # type: ignore[assignment]
    return table


def _apply_masks(projection: Any, args: tuple[torch.Tensor, ...]) -> None:
    slot_T = projection.mask_slot_T[: args[0].shape[0]]
    mask_channels(args[0], projection.mask_bits_SN, slot_T, projection.mask_factors_TI)


def _output_projections(model: nn.Module, channels: int) -> dict[int, Any]:
    """The FFN's output projection of every layer on this rank, by layer index."""
    from vllm.model_executor.models.utils import extract_layer_index

    projections: dict[int, Any] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _OUTPUT_PROJECTIONS and hasattr(module, "input_size_per_partition"):
            layer = extract_layer_index(name)
            if layer in projections or module.input_size != channels:
                raise BackboneError(f"{type(model).__name__}: layer {layer} has no plain FFN of {channels} channels")
            projections[layer] = module
    if not projections:
        raise BackboneError(f"{type(model).__name__}: no FFN found (looked for {', '.join(_OUTPUT_PROJECTIONS)})")
    return dict(sorted(projections.items()))


def _largest_step(config: Any) -> int:
    """Tokens of the largest step, padded to a captured size."""
    return max(
        config.scheduler_config.max_num_batched_tokens, config.compilation_config.max_cudagraph_capture_size or 0
    )


def _refuse_unsupported(config: Any) -> None:
    compact = bool(config.additional_config.get(COMPACT))
    eager = config.model_config.enforce_eager
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "LoRA (its layers bypass the output projection)": config.lora_config is not None,
        "a quantized backbone (activation and quantization may be fused)": config.quant_config is not None,
        "micro-batching (enable_dbo)": getattr(config.parallel_config, "enable_dbo", False),
        f"{COMPACT} in compiled code (--enforce-eager makes it eager)": compact and not eager,
        f"{COMPACT} and tensor parallelism": compact and config.parallel_config.tensor_parallel_size > 1,
    }
    for what, asked in refused.items():
        if asked:
            raise BackboneError(f"masks cannot be served with {what}; start the engine without it")


def _model_state_class(config: Any, model: nn.Module) -> type:
    """Model runner V2: its state class for this model, which also sets the slots of every step."""
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    hook = model.__dict__.pop("get_model_state_cls")
    base: Any = resolve_model_state_cls(config, model)
    model.__dict__["get_model_state_cls"] = hook

    class MaskedModelState(base):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._masks: list[RequestMask | None] = [None] * self.max_num_reqs

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self._masks[req_index] = _mask_of(new_req_data.sampling_params)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            masks = [self._masks[index] for index in input_batch.idx_mapping_np]
            _begin_step(self.model, masks, input_batch.query_start_loc_np[: len(masks) + 1])
            return super().prepare_inputs(input_batch, req_states)

    return MaskedModelState
