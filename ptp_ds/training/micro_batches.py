"""A step's micro-batches: all of them through a layer before the next one, or one after the other through all layers.

    breadth  one packed row of all examples: each layer's weights are needed once a pass
    depth    a packed row a micro-batch, forward and backward before the next: activations of one at a time

Depth repeats the prompt for each micro-batch, and a sharded layer's gather. In return nothing has to be computed again
where the activations of all examples don't fit. The gradients are summed in fp32.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ptp_ds.precision import at_least_fp32
from ptp_ds.tasks.data import deal_rows

Part = TypeVar("Part")
Found = TypeVar("Found")


def dealt(lengths: Sequence[int], parts: int) -> tuple[tuple[int, ...], ...]:
    """The places 0..n-1 in `parts` micro-batches of about as many tokens each, none of them empty."""
    return tuple(tuple(places) for places in deal_rows(lengths, max(1, min(parts, len(lengths)))))


def summed(
    trained: Tensor, parts: Sequence[Part], loss_of: Callable[[Tensor, Part], tuple[Tensor, Found]], scale: float = 1.0
) -> tuple[Tensor, list[Found]]:
    """(a scalar whose gradient to `trained` is that of all parts' losses together, what loss_of found for each part).

    loss_of: of what is trained and a part, its loss and what else is wanted of it. A single part's loss is the scalar
    itself. Of several, each one's backward follows its forward, and the scalar's value says nothing. scale: what losses
    are multiplied by on the way, for gradients in fp16.
    """
    if len(parts) == 1:
        loss, found = loss_of(trained, parts[0])
        return loss, [found]
    leaf = trained.detach().requires_grad_()
    gradient, founds = at_least_fp32(torch.zeros_like(leaf)), []
    for part in parts:
        loss, found = loss_of(leaf, part)
        (loss * scale).backward()
        assert leaf.grad is not None
        gradient += leaf.grad
        leaf.grad = None
        founds.append(found)
    return (at_least_fp32(trained) * (gradient / scale)).sum(), founds
