"""Frozen parameters that lie one behind the other in one memory, so that a product can take them as one matrix."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors [O, ...] as one [sum O, ...], a view; None where they don't lie one behind the other in a memory."""
    first = tensors[0]
    place, memory, rows = first.data_ptr(), first.untyped_storage().data_ptr(), 0
    for tensor in tensors:
        lies_there = tensor.data_ptr() == place and tensor.untyped_storage().data_ptr() == memory
        if not lies_there or not tensor.numel() or not tensor.is_contiguous() or tensor.shape[1:] != first.shape[1:]:
            return None
        place, rows = place + tensor.nbytes, rows + tensor.shape[0]
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


@torch.no_grad()
def lay_together(parameters: Sequence[Any]) -> bool:
    """Moves frozen parameters into one memory, one behind the other, and says whether they lie so.

    Their values stay, and what they had before is free. False, and nothing changed, where they lie in a memory that
    several ranks share (backbone.host_shards) in another order.
    """
    wholes = [getattr(parameter, "ptp_whole", parameter.data) for parameter in parameters]
    if joined(wholes) is not None:
        return True
    if any(hasattr(p, "ptp_whole") and p.ds_tensor.numel() != whole.numel()
           for p, whole in zip(parameters, wholes, strict=True)):  # fmt: skip
        return False
    memory, place = wholes[0].new_empty(sum(whole.numel() for whole in wholes)), 0
    for parameter, whole in zip(parameters, wholes, strict=True):
        part = memory[place : place + whole.numel()]
        place += whole.numel()
        part.copy_(whole.flatten())
        if hasattr(parameter, "ptp_whole"):
            parameter.ds_tensor.data = part
            parameter.ptp_whole = part.view(whole.shape)
        else:
            parameter.data = part.view(whole.shape)
    return True
