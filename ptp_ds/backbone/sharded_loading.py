"""Building and filling a backbone under ZeRO-3: no rank holds more than a tensor, or one layer's experts, whole."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.backbone import decoder_layers
from ptp_ds.backbone.sharding import ResolvedDeepSpeed, send_as_int8
from ptp_ds.errors import UserError
from ptp_ds.models.stored import StoredTensors
from ptp_ds.ranks.distributed import Ranks


def build_sharded(config: Any, deepspeed_config: ResolvedDeepSpeed, auto: Any = AutoModelForCausalLM) -> Any:
    """The model with its parameters partitioned as they are made, values unset: no rank holds more than a tensor."""
    import deepspeed
    from transformers.initialization import no_init_weights

    pad, config.pad_token_id = config.pad_token_id, None  # transformers would zero a row of a sharded embedding
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=deepspeed_config.config):
        model = auto.from_config(config, dtype=deepspeed_config.dtype)
    model.tie_weights()  # no_init_weights leaves this out
    _restore_computed(model, _without_weights(config, deepspeed_config.dtype, auto))
    for module in model.modules():  # roberta's positions are counted from its padding's
        if hasattr(module, "padding_idx") and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            module.padding_idx = module.position_embeddings.padding_idx = pad
    config.pad_token_id = pad
    if deepspeed_config.config["zero_optimization"].get("zero_quantized_weights"):
        send_as_int8(decoder_layers(model))
    dtypes = {parameter.dtype for parameter in model.parameters()}  # a shard on NVMe has none in memory
    assert dtypes == {deepspeed_config.dtype}, f"zero.Init built {dtypes}, wanted {deepspeed_config.dtype}"
    return model


def _without_weights(config: Any, dtype: torch.dtype, auto: Any) -> nn.Module:
    """The model as it is built unsharded, its parameters on the meta device, its buffers computed."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        return auto.from_config(config, dtype=dtype)


def _restore_computed(model: nn.Module, plain: nn.Module) -> None:
    """Gives a sharded model what its family computes while it is built, buffers and other tensors, as it is unsharded.

    zero.Init casts whatever torch's constructors make to the parameters' dtype: rotary frequencies would be bf16.
    """
    for module, unsharded in zip(model.modules(), plain.modules(), strict=True):
        for name, buffer in unsharded.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(_device_of(module._buffers[name]))
        for name, value in vars(unsharded).items():
            if isinstance(value, Tensor) and not value.is_meta:
                setattr(module, name, value.to(_device_of(getattr(module, name))))


def _device_of(tensor: Tensor | None) -> torch.device:
    assert tensor is not None, "the same class has the same tensors, sharded or not"
    return tensor.device


@torch.no_grad()
def fill_randomly(model: Any, deviation: float = 0.02) -> None:
    """Random weights for a sharded model, each rank its own partition: for benchmarks, not for results."""
    for name, parameter in model.named_parameters():
        if len(parameter.ds_shape) == 1:
            parameter.ds_tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.ds_tensor.normal_(0.0, deviation)
        if parameter.ds_secondary_tensor is not None:  # hpZ's copy, made anew from the shards
            parameter.ds_secondary_tensor = None
            parameter.all_gather()
            parameter.partition(has_been_updated=True)


def absent_parameters(model: nn.Module, stored: StoredTensors) -> set[str]:
    """Names of the parameters that the files lack, a tied one only where they hold neither name."""
    canonical = _canonical_names(model)
    held = {canonical[name] for name in stored.shapes if name in canonical}
    return set(canonical.values()) - held


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and the one that named_parameters knows it by."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: names[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


@torch.no_grad()
def fill_from_files(model: Any, stored: StoredTensors, ranks: Ranks, skip: Callable[[str], bool]) -> None:
    """Fills every rank's part of the parameters, read by rank 0, and the buffers that the files hold, on each rank.

    skip: names that are left as they are. Raises ValueError for a tensor of another shape than the configuration's, on
    all ranks, before any of them waits for another.
    """
    canonical = _canonical_names(model)
    parameters = {name: p for name, p in model.named_parameters() if not skip(name)}
    buffers = {name: buffer for name, buffer in model.named_buffers() if not skip(name)}
    for name, found in stored.shapes.items():
        target = parameters.get(canonical.get(name, ""))
        wanted = (
            tuple(target.ds_shape) if target is not None else tuple(buffers[name].shape) if name in buffers else found
        )
        if found != wanted:
            raise UserError(f"{stored.where(name)} has shape {found}, its config.json says {wanted}.")
    wanted_names = {name for name in stored.shapes if canonical.get(name) in parameters or name in buffers}
    for names, read in stored.groups(wanted_names):
        held = [name for name in names if name in buffers]
        values = read() if ranks.is_main or held else {}
        for name in held:
            _set_buffer(model, name, values[name])
        for name in names:
            if canonical.get(name) in parameters:
                _fill(parameters[canonical[name]], values[name] if ranks.is_main else None)


def _fill(parameter: Any, value: Tensor | None) -> None:
    """One parameter on all ranks from rank 0's value."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if value is not None:
            parameter.copy_(value)


def _set_buffer(model: Any, name: str, value: Tensor) -> None:
    """A buffer from the files, in the dtype that transformers gives it: some stay fp32 in a half-precision model."""
    module, _, own = name.rpartition(".")
    holder = model.get_submodule(module)
    before = holder._buffers[own]
    plan = model._get_dtype_plan(next(model.parameters()).dtype)
    kept = [dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", ".*"), name)]
    holder._buffers[own] = value.to(before.device, kept[0] if kept else before.dtype)
