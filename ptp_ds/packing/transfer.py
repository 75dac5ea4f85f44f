"""From the host to a device: all tensors of a thing in one copy, out of pinned memory, that nobody waits for.

A copy of memory that isn't pinned makes the host wait until the device has come to it; what a row needs is made on the
host, therefore, and sent together.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Move = Callable[[Tensor], Tensor]
_LINE = 16  # bytes: where each tensor begins, so that any dtype may


class Movable(Protocol):
    """Plain data that holds tensors."""

    def mapped(self: "M", move: Move) -> "M":
        """The same with `move` of each tensor that goes along, asked for in the same order at every call."""
        ...


M = TypeVar("M", bound=Movable)


def moved(thing: M, device: torch.device | str) -> M:
    """`thing` on `device`; itself where all of its tensors are there."""
    device, given = torch.device(device), list[Tensor]()

    def note(tensor: Tensor) -> Tensor:
        given.append(tensor)
        return tensor

    thing.mapped(note)
    if all(tensor.device == device for tensor in given):
        return thing
    there = iter(to_device(given, device))
    return thing.mapped(lambda _: next(there))


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on `device`, in order; from the host to a GPU they are views of one copy."""
    if device.type in ("cpu", "meta") or any(tensor.device.type != "cpu" for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // _LINE) * _LINE)
    staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for tensor, part in zip(tensors, _views(staged, tensors, starts), strict=True):
        part.copy_(tensor)
    return _views(staged.to(device, non_blocking=True), tensors, starts)


def _views(memory: Tensor, like: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    parts = (memory[start : start + tensor.nbytes] for tensor, start in zip(like, starts, strict=False))
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
