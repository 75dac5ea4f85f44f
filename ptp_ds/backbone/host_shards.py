"""Shards of a frozen model in memory that a host's ranks share: a gather is then a view, nothing is sent or copied.

A single rank's shards are the whole already, on a GPU, too. Without a GPU all ranks of a host compute on one memory.
Frozen weights never change, so each rank's shards may lie in one mapping for all of them, in the order in which they
make up the whole: as much memory as the shards took before. Ranks on several hosts or GPUs, shards elsewhere than
where they are used, int8 gathers and hpZ's second shards keep DeepSpeed's collectives.
"""

import hashlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptp_ds.ranks.distributed import Ranks

_LINE = 64  # bytes: where each parameter begins


def share_on_host(model: nn.Module, ranks: Ranks) -> bool:
    """Moves every shard of `model` into one mapping of this host and says whether it did; all ranks must call it.

    Afterwards each parameter has `ptp_whole`, a view of its whole in that mapping; of its shard, for one rank alone.
    False, and nothing changed, where several ranks aren't all on one host without GPUs, the shards are not in the
    memory of the device that computes, or the mapping can't be made.
    """
    parameters = _in_order(model)
    fit = bool(parameters) and all(_stays(parameter, ranks.device) for parameter in parameters)
    if ranks.world == 1:
        for parameter in parameters if fit else ():
            parameter.ptp_whole = _whole(parameter, parameter.ds_tensor)
        return fit
    fit = fit and ranks.device.type == "cpu"
    if ranks.host_max(int(not fit)) or not _on_one_host(ranks):
        return False
    places, size = [], 0
    for parameter in parameters:
        places.append(size)
        size += -(-parameter.ds_tensor.nbytes * ranks.world // _LINE) * _LINE
    memory = _mapping(size, ranks)
    if memory is None:
        return False
    for parameter, place in zip(parameters, places, strict=True):
        shard = parameter.ds_tensor
        whole = memory[place : place + shard.nbytes * ranks.world].view(shard.dtype)
        own = whole.narrow(0, ranks.rank * shard.numel(), shard.numel())
        own.copy_(shard)
        shard.data = own
        parameter.ptp_whole = _whole(parameter, whole)
    ranks.barrier()
    return True


def _in_order(model: nn.Module) -> list[Any]:
    """The sharded parameters, weights of one module's layers side by side: one product may then take several of them
    (ptp_ds.backbone.adjacent)."""
    modules = list(model.modules())
    beside = [child._parameters.get(kind) for module in modules for kind in ("weight", "bias")
              for child in module.children()]  # fmt: skip
    return list({id(p): p for p in (*beside, *model.parameters()) if hasattr(p, "ds_tensor")}.values())


def show_wholes(parameters: Sequence[Any]) -> None:
    """Gives parameters that were shared their wholes."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for parameter in parameters:
        parameter.data = parameter.ptp_whole
        parameter.ds_status = ZeroParamStatus.AVAILABLE


def hide_wholes(parameters: Sequence[Any]) -> None:
    """Takes them away again: what isn't gathered can't be used by mistake."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    for parameter in parameters:
        parameter.data = parameter.ptp_whole.new_empty(0)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _whole(parameter: Any, memory: torch.Tensor) -> torch.Tensor:
    return memory[: parameter.ds_numel].view(parameter.ds_shape)


def _stays(parameter: Any, device: torch.device) -> bool:
    """Whether the shard is a frozen one in `device`'s own memory, gathered as it is."""
    shard = parameter.ds_tensor
    own = shard.device.type == device.type and shard.numel() == shard.ds_numel and not parameter.requires_grad
    return own and getattr(parameter, "ds_secondary_tensor", None) is None and not getattr(parameter, "ptp_int8", False)


def _on_one_host(ranks: Ranks) -> bool:
    """Whether all ranks see the same kernel, host name, process numbers, network and user."""
    seen: tuple[Any, ...]
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net")]
        seen = (boot, socket.gethostname(), *spaces, os.getuid())
    except (OSError, AttributeError):  # not Linux: each rank a host of its own
        seen = (os.urandom(8),)
    number = int.from_bytes(hashlib.sha256(repr(seen).encode()).digest()[:7])
    return ranks.host_max(number) == -ranks.host_max(-number)


def _mapping(size: int, ranks: Ranks) -> torch.Tensor | None:
    """[size] bytes that all ranks share, gone with the last of them; None on every rank where one can't have it.

    Rank 0's memory file has no name and no folder, so a container's small /dev/shm doesn't matter.
    """
    descriptor, memory = -1, None
    try:
        if ranks.is_main:
            descriptor = os.memfd_create("ptp_ds_shards")
            os.ftruncate(descriptor, size)
    except OSError:
        descriptor = -1
    owner, number = ranks.from_main(os.getpid()), ranks.from_main(descriptor)
    if number >= 0:
        try:
            memory = torch.from_file(f"/proc/{owner}/fd/{number}", shared=True, size=size, dtype=torch.uint8)
        except RuntimeError:
            memory = None
    absent = ranks.host_max(int(memory is None))
    if descriptor >= 0:
        os.close(descriptor)
    return None if absent else memory
