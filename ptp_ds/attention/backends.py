"""Which of torch's attention kernels scaled_dot_product_attention may take inside our passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
