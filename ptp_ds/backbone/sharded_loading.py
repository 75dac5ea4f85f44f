"""Building and filling a backbone under ZeRO-3: no rank holds more than a tensor, or one layer's experts, whole."""

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.backbone import decoder_layers
from ptp_ds.backbone.sharding import ResolvedDeepSpeed, send_as_int8
from ptp_ds.errors import UserError
from ptp_ds.models.stored import StoredTensors
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.log import get_logger

log = get_logger(__name__)


def build_sharded(
    config: Any, deepspeed_config: ResolvedDeepSpeed, auto: Any = AutoModelForCausalLM,
    untied: Callable[[Any], Collection[str]] = lambda model: (),
) -> Any:  # fmt: skip
    """The model with its parameters partitioned as they are made, values unset: no rank holds more than a tensor.

    untied: given the model, the names that are left untied, whatever its configuration says; see untied_in_files.
    """
    import deepspeed
    from transformers.initialization import no_init_weights

    with (
        no_init_weights(),
        _no_padding(config) as pad,
        deepspeed.zero.Init(config_dict_or_path=deepspeed_config.config),
    ):
        model = auto.from_config(config, dtype=deepspeed_config.dtype)
    for name in untied(model):
        del model.all_tied_weights_keys[name]
    model.tie_weights(recompute_mapping=False)  # no_init_weights leaves this out
    plain = _without_weights(config, deepspeed_config.dtype, auto)
    _restore_computed(model, plain)
    _restore_dtypes(model, plain, deepspeed_config.dtype)
    for module in model.modules():  # roberta's positions are counted from its padding's
        if hasattr(module, "padding_idx") and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            module.padding_idx = module.position_embeddings.padding_idx = pad
    if deepspeed_config.config["zero_optimization"].get("zero_quantized_weights"):
        send_as_int8(decoder_layers(model))
    return model


@contextmanager
def _no_padding(config: Any) -> Iterator[int | None]:
    """No configuration inside names a padding token: transformers would zero its row of a sharded embedding.

    Gives the language model's own.
    """
    text = config.get_text_config()
    parts = {id(part): part for part in (config, text, *(getattr(config, name, None) for name in config.sub_configs))}
    named = [(part, part.pad_token_id) for part in parts.values() if hasattr(part, "pad_token_id")]
    for part, _ in named:
        object.__setattr__(part, "pad_token_id", None)  # some configurations hold it to be an integer
    try:
        yield next((pad for part, pad in named if part is text), None)
    finally:
        for part, pad in named:
            part.pad_token_id = pad


def _restore_dtypes(model: Any, plain: nn.Module, dtype: torch.dtype) -> None:
    """Gives parameters the dtypes that they have unsharded: some are fp32 in a half-precision model, a router's matrix
    for one. Refused on NVMe, whose files hold one dtype."""
    unsharded = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = _dtype_of(model, name, dtype, unsharded[name].dtype)
        assert parameter.dtype in (dtype, wanted), f"zero.Init built {name} in {parameter.dtype}, wanted {dtype}"
        if wanted == dtype:
            continue
        if parameter.ds_tensor.numel() != parameter.ds_tensor.ds_numel:
            raise UserError(
                f"Model family {model.config.model_type!r} keeps {name!r} in {str(wanted).split('.')[1]}, which shards "
                "on NVMe can't hold beside others; use --precision fp32 or ds_configs/zero3_offload.json."
            )
        for holder in (parameter, parameter.ds_tensor, parameter.ds_secondary_tensor):
            if holder is not None:
                holder.data = holder.data.to(wanted)


def _dtype_of(model: Any, name: str, dtype: torch.dtype, otherwise: torch.dtype) -> torch.dtype:
    """The dtype that transformers gives a tensor that the family names for a model of `dtype`, else `otherwise`."""
    plan = model._get_dtype_plan(dtype)
    kept = [found for pattern, found in plan.items() if re.search(pattern.replace("*", ".*"), name)]
    return kept[0] if kept else otherwise


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


def untied_in_files(model: Any, stored: StoredTensors, ranks: Ranks) -> list[str]:
    """Names that the configuration ties to others and whose values in the files are not the others': transformers
    leaves them untied, too. Said once; rank 0 reads, and all ranks must call it.

    model: as it is built, nothing tied yet.
    """
    held, untied = {name: name for name in stored.shapes}, []
    for target, source in model.all_tied_weights_keys.items():
        if target in held and source in held:
            if ranks.from_main(int(ranks.is_main and not stored.equal(held[target], held[source]))):
                untied.append(target)
                log.warning(
                    "warning: %s and %s differ, though config.json ties them: they are left as they are stored",
                    stored.where(held[target]), held[source],
                )  # fmt: skip
        elif target in held:  # tied: what the one holds is the other's
            held[source] = held[target]
        elif source in held:
            held[target] = held[source]
    return untied


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
    holder._buffers[own] = value.to(before.device, _dtype_of(model, name, model.dtype, before.dtype))
