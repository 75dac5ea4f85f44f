"""Products with frozen weights: nothing is kept for backward but the weight, and on a CPU they are oneDNN's.

torch hands fp32 products to MKL, whose AVX-512 code serves Intel's processors alone; every torch for x86 also holds
oneDNN, which uses AVX-512 wherever it is. Both compute in fp32. Under ZeRO-3 DeepSpeed's linear keeps its input, though
a frozen weight needs no gradient: here nothing does.
"""

import platform
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_LEAST = 1 << 24  # operations worth oneDNN's start: 9 us more a call than torch's, 1 ms for a shape not seen before
_LONGEST = (
    768  # terms of a sum in one go: oneDNN adds them in longer chains than MKL, 2 times its rounding at 1536 terms
)
_CLOSE = 1e-5  # relative l2 distance between two ways of the same fp32 product
_TORCHS: Product = torch._C._nn.linear  # F.linear itself, whatever stands in its place


class FrozenLinear(torch.autograd.Function):
    """x [..., I] -> x W^T + bias [..., O], no gradient but x's.

    weight: the parameter W [O, I] itself, or [I, O] where `turned`; under ZeRO-3 its data comes and goes, and is whole
    again when the backward reads it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, turned, product):  # type: ignore[override]
        ctx.weight, ctx.turned, ctx.product = weight, turned, product
        return _flat(product, x, weight.t() if turned else weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        weight = ctx.weight if ctx.turned else ctx.weight.t()
        return _flat(ctx.product, grad, weight, None), None, None, None, None


def _flat(product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product of x [..., I] as one matrix. No view of it: some families change their layers' outputs in place."""
    out = product(x.reshape(-1, x.shape[-1]), weight, bias)
    return torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] W^T + bias by torch's own product.

    ZeRO-3 puts DeepSpeed's in F.linear's place, an autograd function whose call takes more of the processor's time than
    a small product, for gradients of weights that are frozen here.
    """
    return _TORCHS(x, weight, bias)


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is large enough to be faster than torch's own."""
    return 2 * x.numel() * weight.shape[0] >= _LEAST


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] W^T + bias, weight [O, I] in any layout: by oneDNN where that suits, else by torch's own.

    Long sums are made of parts of _LONGEST terms, each added to those before as it is written: as exact as short ones.
    """
    if not suits_onednn(x, weight):
        return torchs(x, weight, bias)
    terms = weight.shape[1]
    parts = -(-terms // _LONGEST)
    cuts = [terms * part // parts for part in range(parts + 1)]
    out = torch.ops.mkldnn._linear_pointwise(x[..., : cuts[1]], _columns(weight, 0, cuts[1]), bias, "none", [], "")
    for start, stop in pairwise(cuts[1:]):
        part = _columns(weight, start, stop)
        out = torch.ops.mkldnn._linear_pointwise.binary(x[..., start:stop], out, part, None, "add")
    return out


def _columns(weight: Tensor, start: int, stop: int) -> Tensor:
    """weight[:, start:stop] as oneDNN is fast with: its rows, or its columns, without gaps."""
    part = weight[:, start:stop]
    return part if weight.stride(1) != 1 else part.contiguous()


def product_for(impl: str, device: torch.device, dtype: torch.dtype) -> tuple[Product, str]:
    """(the product of frozen weights, "") or (torch's own, why it isn't oneDNN's). impl: "torch" takes torch's."""
    if impl == "torch":
        return torchs, "--kernels torch"
    if device.type != "cpu" or dtype != torch.float32:
        return torchs, "oneDNN's are for fp32 on a CPU"
    reason = _refusal()
    return (torchs, reason) if reason else (onednn, "")


def explain_product(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which product runs, and why, in a few words."""
    reason = product_for(impl, device, dtype)[1]
    return f"torch's own ({reason})" if reason else "oneDNN's, AVX-512"


@cache
def _refusal() -> str:
    """Why this machine's fp32 products aren't oneDNN's; "" where they are."""
    maker = _maker()
    if maker in ("", "GenuineIntel") or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "MKL leaves no AVX-512 out on this processor"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    return trial(onednn)


def trial(product: Product) -> str:
    """Why `product`, called as `onednn` is, isn't the product that it should be; "" where it is."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    x, weight = (torch.randn(rows, 2 * _LONGEST, generator=generator) for rows in (1024, 96))
    bias = torch.randn(96, generator=generator)
    for terms in (96, 2 * _LONGEST):
        short, turned = weight[:, :terms].contiguous(), weight[:, :terms].t().contiguous().t()
        for given, matrix in ((bias, short), (None, turned)):
            wanted = F.linear(x[:, :terms].double(), matrix.double(), None if given is None else given.double())
            try:
                found = product(x[:, :terms].contiguous(), matrix, given)
                error = float((found - wanted).norm() / wanted.norm())
            except (RuntimeError, TypeError, AttributeError) as failed:
                return f"oneDNN's fails here: {str(failed).splitlines()[0]}"
            if not error <= _CLOSE:
                return f"oneDNN's differs by {error:.0e}"
    return ""


def _maker() -> str:
    """The x86 processor's vendor, "" where it isn't known."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file():
        return ""
    lines = (line.partition(":") for line in info.read_text().splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == "vendor_id"), "")


def replace_products(modules: Iterable[nn.Module], impl: str, sharded: bool) -> int:
    """Gives plain linear layers of a frozen model their FrozenLinear where it brings something; returns how many.

    That is with oneDNN's product, or under ZeRO-3 (sharded). A layer whose weight is trained (a classifier) is itself.
    """
    found: list[Any] = [module for module in modules if type(module) in (nn.Linear, Conv1D)]
    if not found:
        return 0
    product, reason = product_for(impl, found[0].weight.device, found[0].weight.dtype)
    if reason and not sharded:
        return 0
    for module in found:
        module.forward = partial(_forward, module, module.forward, product, type(module) is Conv1D)
    return len(found)


def _forward(module: Any, own: Callable[[Tensor], Tensor], product: Product, turned: bool, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad) or x.dtype != weight.dtype:
        return own(x)
    return FrozenLinear.apply(x, weight, bias, turned, product)
