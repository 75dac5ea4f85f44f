"""Where a packed row's tokens lie among its examples: what every kernel over rows is given."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """movable [T] bool: tokens that may get a delta. example_of [T]: the example of each, rising. starts [B + 1]: where
    each example's tokens begin. numbers [B]: the examples' numbers in their split. source [T]: the token whose delta a
    token takes, or None where each takes its own. All on one device; integers are int64.
    """

    movable: Tensor
    example_of: Tensor
    starts: Tensor
    numbers: Tensor
    source: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.movable.shape[0]

    @property
    def examples(self) -> int:
        return self.numbers.shape[0]

    def sums(self, values_T: Tensor) -> Tensor:
        """[B] each example's sum, the same to the bit in every run; index_add_ on a GPU adds in any order."""
        return torch.segment_reduce(values_T, "sum", offsets=self.starts, unsafe=True)

    def offsets(self) -> Tensor:
        """[T] each token's distance from its example's first one."""
        return torch.arange(self.tokens, device=self.movable.device) - self.starts[self.example_of]


def add_at(sums_N: Tensor, places_M: Tensor, values_M: Tensor) -> Tensor:
    """sums[places] += values, in place, the same to the bit in every run; rows alike, where both have rows.

    On a GPU index_put_ sorts its places first and index_add_ adds by atomics; on a CPU it is index_put_ that does,
    from 32768 values on.
    """
    if sums_N.is_cuda:
        return sums_N.index_put_((places_M,), values_M, accumulate=True)
    return sums_N.index_add_(0, places_M, values_M)


def places_of(movable: Tensor, example_of: Tensor, numbers: Tensor, source: Tensor | None = None) -> Places:
    """Places whose starts are found on the device, without waiting for it."""
    firsts = torch.arange(numbers.shape[0] + 1, device=example_of.device)
    return Places(movable, example_of, torch.searchsorted(example_of, firsts), numbers, source)
