"""What a ds_config may ask of ZeRO-3 beyond plain shards: hpZ, int8 gathers, weights on CPU or NVMe.

Checked before any model or process group exists; what this machine can't do is refused in one sentence.
"""

import os
from pathlib import Path
from typing import Any

import torch

from ptp_ds.backbone.shapes import ModelShape, elements
from ptp_ds.errors import UserError
from ptp_ds.files import brief

_INT8 = "zero_quantized_weights"
# Options of the backbone's weights alone: the prompt, a few megabytes in DeepSpeed's engine, stays as it is.
BACKBONE_ONLY = ("zero_hpz_partition_size", _INT8, "offload_param")


def check_zero_options(file: str, zero: dict[str, Any]) -> None:
    """Raises ValueError for options that contradict each other, or that don't work here on any machine."""
    stored = "zero_quantized_nontrainable_weights"
    if zero.get(stored):
        raise UserError(
            f"--ds_config {file}: remove {stored}: DeepSpeed 0.19.8 rounds weights that are loaded into int8 shards to "
            f"whole numbers; {_INT8} keeps the shards and sends int8."
        )
    if zero.get("zero_quantized_gradients"):
        raise UserError(
            f"--ds_config {file}: remove zero_quantized_gradients: only the prompt has any, a few megabytes."
        )
    size = zero.get("zero_hpz_partition_size", 1)
    if size != "auto" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise UserError(
            f'--ds_config {file}: zero_hpz_partition_size is {brief(size)}; expected "auto" (the ranks of a host) or a '
            "whole number of 1 or more."
        )
    device = zero.get("offload_param", {}).get("device", "none")
    wanted = {"zero_hpz_partition_size": size != 1, _INT8: bool(zero.get(_INT8)), "offload_param": device != "none"}
    asked = [name for name, on in wanted.items() if on]
    if asked and zero["stage"] != 3:
        raise UserError(f"--ds_config {file}: {asked[0]} needs stage 3; stage 2 keeps all weights on each rank.")
    if device == "nvme" and len(asked) > 1:
        raise UserError(f"--ds_config {file}: {asked[0]} and weights on NVMe don't go together; remove one.")


def resolve_zero_options(
    zero: dict[str, Any], file: str, notes: list[str], *, world: int, host_ranks: int, nvme_path: str | None,
    shape: ModelShape | None,
) -> None:  # fmt: skip
    """Fills in "auto" and refuses what this machine or this number of ranks can't do, with ValueError.

    host_ranks: ranks of this host. shape: the model's, for the buffers of weights on NVMe.
    """
    if zero.get("zero_hpz_partition_size") == "auto":
        zero["zero_hpz_partition_size"] = host_ranks
        notes.append(f"zero_optimization.zero_hpz_partition_size = {host_ranks} (ranks of this host)")
    size = zero.get("zero_hpz_partition_size", 1)
    if world % size or host_ranks % size:
        raise UserError(
            f"{file}: zero_hpz_partition_size {brief(size)} must divide the {host_ranks} ranks of a host and the "
            f'{world} of the run; "auto" takes the ranks of a host.'
        )
    if zero.get(_INT8):
        require_quantiser(file)
    offload = zero.get("offload_param", {})
    if nvme_path is not None and offload.get("device") != "nvme":
        raise UserError(f"--nvme_path is for weights on NVMe; {file} has none there: use ds_configs/zero3_nvme.json.")
    if offload.get("device") == "nvme":
        _resolve_nvme(offload, file, notes, world, nvme_path, shape)


def require_quantiser(file: str) -> None:
    """ValueError where DeepSpeed's int8 kernels can't run."""
    if not torch.cuda.is_available():
        raise UserError(
            f"{file}: {_INT8} needs a CUDA GPU, and there is none here; use ds_configs/zero3_hpz.json or zero3.json."
        )
    from deepspeed.ops.op_builder import QuantizerBuilder

    if not QuantizerBuilder().is_compatible(verbose=False):
        raise UserError(f"{file}: {_INT8} compiles DeepSpeed's quantizer, which needs CUDA's nvcc; install it.")


def _resolve_nvme(
    offload: dict[str, Any], file: str, notes: list[str], world: int, nvme_path: str | None, shape: ModelShape | None
) -> None:
    """The folder, and buffers for the shards that ptp_ds.backbone.sharding holds at once: two layers and what lies
    outside."""
    if offload.get("nvme_path", "auto") == "auto":
        if nvme_path is None:
            raise UserError(f"{file} keeps weights on NVMe: give --nvme_path, a folder on each host's own NVMe disk.")
        offload["nvme_path"] = nvme_path
    elif nvme_path not in (None, offload["nvme_path"]):
        raise UserError(f"{file} has nvme_path {offload['nvme_path']}, --nvme_path says {nvme_path}; make them agree.")
    folder = Path(offload["nvme_path"])
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--nvme_path {folder} is no folder that can be written; make it on each host's own NVMe disk.")
    require_async_io(file)
    if shape is None:
        return
    most = 2 * max(len(layer) for layer in shape.layers) + len(shape.outside_layers)
    largest = max(-(-elements([parameter]) // world) for parameter in shape.parameters)
    for name, value in (("buffer_count", most), ("buffer_size", largest)):
        if offload.get(name, "auto") == "auto":
            offload[name] = value
            notes.append(
                f"zero_optimization.offload_param.{name} = {value} (two layers and all outside the layers at once)"
            )


def require_async_io(file: str) -> None:
    """ValueError where DeepSpeed's asynchronous reads can't be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            f"{file}: weights on NVMe need DeepSpeed's async_io, which needs libaio's headers (Debian: libaio-dev) and "
            "a C++ compiler; install them."
        )
