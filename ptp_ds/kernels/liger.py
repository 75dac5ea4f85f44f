"""Norms, gated feed-forwards and rotary positions from Liger-Kernel, where it is installed and the model is on a GPU.

`pip install ptp_ds[kernels]` brings it. backbone.frozen_ops tries each one against the family's own code before it
takes its place. Source: Hsu et al. 2024, "Liger Kernel: Efficient Triton kernels for LLM training".
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptp_ds.kernels.choice import DTYPES

_CASTS = ("llama", "gemma")  # where a family rounds: after the inverse root alone, or behind everything
_NARROW, _MANY = 256, 1 << 15  # norms of at most so many numbers take another kernel from so many rows on (0.8.5)


def available(impl: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Liger's kernels are worth a try: never for impl="torch", on a CPU, or in fp64."""
    wanted = impl != "torch" and device.type == "cuda" and dtype in DTYPES
    return wanted and importlib.util.find_spec("liger_kernel") is not None


def norms(weight: Callable[[], Tensor], epsilon: float) -> list[Callable[[Tensor], Tensor]]:
    """RMS norms that a module with this weight may compute; gemma's weights start at 0."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def norm(offset: float, casts: str) -> Callable[[Tensor], Tensor]:
        return lambda x: LigerRMSNormFunction.apply(x, weight(), epsilon, offset, casts, False)

    return [norm(offset, casts) for offset in (0.0, 1.0) for casts in _CASTS]


def rows_to_try(width: int) -> tuple[int, ...]:
    """Rows at which a norm of `width` numbers is tried: one number for each kernel that Liger has for it.

    Queries' and keys' norms are narrow and have a row a head: a packed row of a few thousand tokens has that many.
    """
    return (5, _MANY + 1) if width <= _NARROW else (5,)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """(q, k) turned; q, k [1, heads, T, d], cos, sin [1, T, d]."""
    from liger_kernel.ops.rope import LigerRopeFunction

    return LigerRopeFunction.apply(q, k, cos, sin)
