"""What torch's attention may do inside our passes: which kernels it takes, in which order a backward adds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_memory: Any = torch.utils.deterministic  # a module with a property, which mypy can't see


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Inside, torch's scaled_dot_product_attention doesn't take cuDNN; afterwards it may again, if it might before.

    On Hopper cuDNN comes first and builds a plan for every new shape, and rows have new shapes at each step. The other
    kernels stay as they were allowed. The choice is made in the forward, so that a backward needs nothing.
    """
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


@contextmanager
def in_one_order() -> Iterator[None]:
    """Inside, torch's operators give the same bits in every run or are refused; afterwards as the program had chosen.

    For a flash backward alone: torch's matrix products would be refused, too. New memory is not filled, as torch's own
    setting would have it here.
    """
    mode, fills = torch.get_deterministic_debug_mode(), _memory.fill_uninitialized_memory
    _memory.fill_uninitialized_memory = False
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        _memory.fill_uninitialized_memory = fills
