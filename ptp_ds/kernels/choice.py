"""Which implementation of an operation runs: its Triton kernel on a CUDA GPU, its torch reference everywhere else.

Every operation of ptp_ds.kernels takes impl="auto", "triton" or "torch". auto is the kernel where tensors lie on a CUDA
device on which a first kernel ran, in a dtype that kernels know; TRITON_INTERPRET=1, set before the first import, lets
"triton" run on a CPU, slowly, for tests.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ptp_ds.choices import IMPLS
from ptp_ds.errors import UserError

triton: Any = None
tl: Any = SimpleNamespace(constexpr=None)  # what signatures name where there is no Triton
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:
    pass

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jit(function: Callable | None = None, *, varying: Sequence[str] = ()) -> Any:
    """triton.jit, or, where there is no Triton, the function as it is, never called.

    varying: integer arguments that change from call to call, for whose values nothing is compiled anew.
    """
    if function is None:
        return partial(jit, varying=varying)
    return triton.jit(function, do_not_specialize=list(varying)) if triton is not None else function


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(impl: str, *tensors: Tensor) -> bool:
    """Whether `tensors` go to the kernel.

    Raises ValueError for an unknown impl, and for impl="triton" where the kernel can't run.
    """
    if impl not in IMPLS:
        raise UserError(f"Unknown impl {impl!r}; choose from {', '.join(IMPLS)}.")
    if impl == "torch":
        return False
    reason = refusal(tensors[0].device, *(tensor.dtype for tensor in tensors if tensor.is_floating_point()))
    if impl == "triton" and reason:
        raise UserError(f"impl='triton' can't run here: {reason}. Use impl='auto' or impl='torch'.")
    return not reason and (impl == "triton" or not interpreted())


def refusal(device: torch.device, *dtypes: torch.dtype) -> str:
    """Why no kernel runs on `device` with these dtypes; "" where one does."""
    if triton is None:
        return "Triton is not installed"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"kernels know fp32, bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if interpreted():
        return ""
    return "tensors lie on a CPU" if device.type != "cuda" else _trial(device)


def explain(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """One line: which implementation runs, and why."""
    reason = "--kernels torch" if impl == "torch" else refusal(device, dtype)
    if reason or (impl == "auto" and interpreted()):
        return f"torch ({reason or 'auto never interprets'})"
    return f"triton {triton.__version__} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'a CPU'}"


@jit
def _copy_kernel(x, out, N: tl.constexpr):
    places = tl.arange(0, N)
    tl.store(out + places, tl.load(x + places))


@cache
def _trial(device: torch.device) -> str:
    """Compiles and runs one kernel on `device`; says what went wrong."""
    x = torch.arange(16, dtype=torch.float32, device=device)
    out = torch.zeros_like(x)
    try:
        with torch.cuda.device(device):
            _copy_kernel[(1,)](x, out, N=16)
        return "" if torch.equal(x, out) else "a first kernel gave a wrong result"
    except Exception as error:  # a missing compiler, driver or architecture: each has an exception of its own
        return f"a first kernel failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def block_of(size: int, most: int) -> int:
    """The power of two at or above `size`, at most `most`."""
    return min(1 << max(0, size - 1).bit_length(), most)


def warps_of(numbers: int) -> int:
    """Warps of a program that holds so many numbers of each of its tensors: 16 a thread, at least 4 and at most 32.

    A token of 16384 numbers in 4 warps is 128 a thread of each tensor: its registers spill hundreds of bytes.
    """
    return min(max(numbers // 512, 4), 32)
