"""Norms and gated feed-forwards whose weights are frozen, in fewer passes over memory than their modules take.

No gradient for weights, and nothing kept for backward that can be had again at once. A module is replaced only where,
tried on random input, it computes the same values and gradients; a family's own code runs everywhere else.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DTYPES = (torch.float32,)  # in other precisions each family rounds where it chooses to


class FrozenRMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[override]
        width = x.shape[-1]
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        weighted = grad * weight
        inner = torch.linalg.vecdot(weighted, x).unsqueeze(-1).mul_(inverse.pow(3)).mul_(1 / x.shape[-1])
        return weighted.mul_(inverse).addcmul_(x, inner, value=-1), None, None


class GatedSilu(torch.autograd.Function):
    """silu(gate) * up; keeps gate and up."""

    @staticmethod
    def forward(ctx, gate, up):  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def _norm_forward(module: Any, offset: float, x: Tensor) -> Tensor:
    weight = module.weight + offset if offset else module.weight
    return FrozenRMSNorm.apply(x, weight, _epsilon(module))


def _gated_forward(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(GatedSilu.apply(module.gate_proj(x), module.up_proj(x)))


def _epsilon(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))


def _candidates(module: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """What the module might compute, judged by its parts alone."""
    parts = {name for name, _ in module.named_children()}
    if not parts and [name for name, _ in module.named_parameters()] == ["weight"] and _epsilon(module) > 0:
        return [partial(_norm_forward, module, offset) for offset in (0.0, 1.0)]  # gemma's weights start at 0
    if {"gate_proj", "up_proj", "down_proj"} <= parts <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return [partial(_gated_forward, module)]
    return []


def _input_width(module: Any) -> int:
    return module.gate_proj.in_features if hasattr(module, "gate_proj") else module.weight.shape[-1]


def _agrees(module: nn.Module, candidate: Callable[[Tensor], Tensor]) -> bool:
    """The same values and input gradients on random input, to rounding."""
    weight = next(module.parameters())
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(1, 3, _input_width(module), generator=generator).to(weight).requires_grad_()
    with torch.enable_grad():
        expected, found = module(x), candidate(x)
    if expected.shape != found.shape:
        return False
    wanted, got = (torch.autograd.grad(out.square().sum(), x)[0] for out in (expected, found))
    pairs = ((expected, found), (wanted, got))
    return all(float((a - b).detach().norm()) <= 1e-5 * float(a.detach().norm()) for a, b in pairs)


def replace_frozen(first: Iterable[nn.Module], modules: Sequence[nn.Module]) -> set[str]:
    """Replaces the forward of every module in `modules` whose class proved replaceable on a module of `first`.

    first: modules whose weights are whole at this moment. Returns the replaced classes' names.
    """
    proven: dict[type, int] = {}
    for module in first:
        weight = next(module.parameters(), None)
        if type(module) in proven or weight is None or weight.dtype not in _DTYPES:
            continue
        for number, candidate in enumerate(_candidates(module)):
            if _agrees(module, candidate):
                proven[type(module)] = number
                break
    for module in modules:
        if type(module) in proven:
            module.forward = _candidates(module)[proven[type(module)]]  # type: ignore[method-assign]
    return {kind.__name__ for kind in proven}
