"""Norms, gated feed-forwards and rotary positions of a frozen model, in fewer passes over memory than its own code.

No gradient for weights, and nothing kept for backward that can be had again at once. On a GPU they are Liger's kernels
(ptp_ds.kernels.liger) where these are installed, else, and elsewhere, those of this file. Something is replaced only
where, tried out, it computes the same values and gradients; a family's own code runs everywhere else.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptp_ds.kernels import liger
from ptp_ds.precision import at_least_fp32
from ptp_ds.ranks.log import ANY_RANK, get_logger

log = get_logger(__name__)

_CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_ROTARY = "apply_rotary_pos_emb"  # the families' common name
_TOKENS = 5  # of what something is tried on


class FrozenRMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; keeps x and one number a row.

    Computed in fp32 at least, and rounded once.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[override]
        width, precise = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        inverse = norm.square_().mul_(1 / width).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        precise = x.to(inverse.dtype)
        weighted = grad * weight.to(precise.dtype)
        inner = torch.linalg.vecdot(weighted, precise).unsqueeze(-1).mul_(inverse.pow(3)).mul_(1 / x.shape[-1])
        return weighted.mul_(inverse).addcmul_(precise, inner, value=-1).to(x.dtype), None, None


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


class FrozenRotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin over the last axis, where rotate_half((a, b)) = (-b, a); keeps cos and sin."""

    @staticmethod
    def forward(ctx, x, cos, sin):  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, *_halves(sin), 1.0)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        first, second = _halves(sin)
        return _turn(grad, cos, second, first, -1.0), None, None


def _served(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this file's operations stand in for tensors like that: fp32 and bf16, on a GPU fp16 as well."""
    return dtype in (torch.float32, torch.bfloat16) or (dtype == torch.float16 and device.type == "cuda")


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=-1)
    return first, second


def _turn(x: Tensor, cos: Tensor, to_first: Tensor, to_second: Tensor, sign: float) -> Tensor:
    """x * cos + sign * (-x_second * to_first, x_first * to_second)."""
    (x_first, x_second), out = _halves(x), x * cos
    out_first, out_second = _halves(out)
    out_first.addcmul_(x_second, to_first, value=-sign)
    out_second.addcmul_(x_first, to_second, value=sign)
    return out


class _Rotary:
    """Stands in for a family's apply_rotary_pos_emb(q, k, cos, sin) that is FrozenRotary in other words.

    fused: by Liger's kernel, which reads the first half of cos and sin alone: the first call looks whether both are
    the same, as every rotation's are, and goes back to FrozenRotary where they aren't.
    """

    def __init__(self, familys: Callable[..., tuple[Tensor, Tensor]], fused: bool, like: Tensor) -> None:
        self.familys, self.fused, self.like, self.looked = familys, fused, like, not fused

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = _served(q.device, q.dtype) and q.dtype == cos.dtype == self.like.dtype
        if args or kwargs or not known or cos.shape[-1] != q.shape[-1]:
            return self.familys(q, k, cos, sin, *args, **kwargs)
        if not self.looked:
            self.looked = True
            self.fused = all(torch.equal(*_halves(x)) for x in (cos, sin))
        return self._ours(q, k, cos, sin)

    def _ours(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if self.fused:
            return liger.rotary(q, k, cos, sin)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return FrozenRotary.apply(q, cos, sin), FrozenRotary.apply(k, cos, sin)

    def agrees(self, module: Any) -> bool:
        """Whether both give the same on random numbers, queries and keys alike, in the heads of an attention module."""
        if list(inspect.signature(self.familys).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
            return False
        config, width = getattr(module, "config", None), getattr(module, "head_dim", 8)
        counts = [getattr(config, f"num_{name}_heads", None) or 2 for name in ("attention", "key_value")]
        generator = torch.Generator(device="cpu").manual_seed(0)
        x, c, s = torch.randn(3, 1, _TOKENS, width, generator=generator).to(self.like)
        if self.fused:
            c, s = (torch.cat([_halves(turn)[0]] * 2, dim=-1) for turn in (c, s))

        def one(function: Callable[..., Any], number: int) -> Callable[[Tensor], Tensor]:
            def turned(x: Tensor) -> Tensor:
                q, k = (x.expand(1, count, -1, -1).clone() for count in counts)  # Liger turns them in place
                return function(q, k, c, s)[number]

            return turned

        close = _CLOSE.get(self.like.dtype, 0.0)
        return all(max(_error(x, one(self.familys, number), one(self._ours, number))) <= close for number in (0, 1))


def _norm_forward(module: Any, offset: float, x: Tensor) -> Tensor:
    weight = at_least_fp32(module.weight) + offset if offset else module.weight
    return FrozenRMSNorm.apply(x, weight, _epsilon(module))


def _gated_forward(module: Any, gated_silu: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    return module.down_proj(gated_silu(module.gate_proj(x), module.up_proj(x)))


def _epsilon(module: Any) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))


def _candidates(module: Any, fused: bool) -> list[Callable[[Tensor], Tensor]]:
    """What the module might compute, judged by its parts alone. fused: by Liger's kernels."""
    parts = {name for name, _ in module.named_children()}
    if not parts and [name for name, _ in module.named_parameters()] == ["weight"] and _epsilon(module) > 0:
        if fused:
            return liger.norms(lambda: module.weight, _epsilon(module))
        return [partial(_norm_forward, module, offset) for offset in (0.0, 1.0)]  # gemma's weights start at 0
    if {"gate_proj", "up_proj", "down_proj"} <= parts <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return [partial(_gated_forward, module, liger.gated_silu if fused else GatedSilu.apply)]
    return []


def _input_width(module: Any) -> int:
    return module.gate_proj.in_features if hasattr(module, "gate_proj") else module.weight.shape[-1]


def _closest(module: nn.Module, fused: bool) -> int | None:
    """The candidate that comes closest to the module's own values and gradients; None where none is close enough."""
    candidates, weight = _candidates(module, fused) if _takes_one(module) else [], next(module.parameters())
    if not candidates:
        return None
    width, generator = _input_width(module), torch.Generator(device="cpu").manual_seed(0)
    is_norm = not hasattr(module, "gate_proj")
    tried = [torch.randn(1, rows, width, generator=generator).to(weight)
             for rows in (liger.rows_to_try(width) if fused and is_norm else (_TOKENS,))]  # fmt: skip
    errors = [max(max(_error(x, module, candidate)) for x in tried) for candidate in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    return best if errors[best] <= _CLOSE.get(weight.dtype, 0.0) else None


def _error(x: Tensor, known: Callable[[Tensor], Tensor], candidate: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Relative l2 distances of values and of input gradients at x; infinite where either fails."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        try:
            expected = known(x)
            weight = expected.detach().cos()
            (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
        except Exception:  # not an operation on one tensor of this width: the family's own code stays
            return math.inf, math.inf
        try:
            found = candidate(x)
            if found.shape != expected.shape:
                return math.inf, math.inf
            (got,) = torch.autograd.grad((found * weight).sum(), x)
        except Exception as error:  # a kernel that doesn't compile here: the family's own code stays
            log.warning("ptp_ds: a fused layer fails here (%s); it is left out.", type(error).__name__, extra=ANY_RANK)
            return math.inf, math.inf
    pairs = ((expected, found), (wanted, got))
    of_values, of_gradients = ((a - b).detach().float().norm() / a.detach().float().norm() for a, b in pairs)
    return float(of_values.nan_to_num(math.inf)), float(of_gradients.nan_to_num(math.inf))


def _replace_rotary(modules: Iterable[nn.Module], ways: Sequence[bool], like: Tensor) -> None:
    """Modules whose class calls apply_rotary_pos_emb call a _Rotary instead: their own forward, one name rebound."""
    proven: dict[Any, _Rotary | None] = {}
    for module in modules:
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
            continue
        familys: Any = forward.__globals__.get(_ROTARY)
        if not isinstance(familys, FunctionType):
            continue
        if familys not in proven:
            stand_ins = (_Rotary(familys, fused, like) for fused in ways)
            proven[familys] = next((one for one in stand_ins if one.agrees(module)), None)
        if proven[familys] is not None:
            names = {**forward.__globals__, _ROTARY: proven[familys]}
            rebound = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            rebound.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(rebound, module)  # type: ignore[method-assign]


def replace_frozen(first: Iterable[nn.Module], modules: Sequence[nn.Module], impl: str = "auto") -> dict[str, str]:
    """Replaces the forward of every module in `modules` whose class proved replaceable on a module of `first`.

    first: modules whose weights are whole at this moment. impl: "torch" leaves Liger out. Returns the replaced classes'
    names, attention left out, each with whose code took its place: "Liger's" or "ours".
    """
    first = list(first)
    like = next((weight for module in first for weight in module.parameters()), torch.empty(0))
    _replace_rotary(modules, _ways(impl, like), like)
    proven: dict[_Kind, tuple[bool, int]] = {}
    for module in first:
        weight = next(module.parameters(), None)
        if _kind(module) in proven or weight is None:
            continue
        for fused in _ways(impl, weight):
            if (number := _closest(module, fused)) is not None:
                proven[_kind(module)] = fused, number
                break
    for module in modules:
        if _kind(module) in proven:
            fused, number = proven[_kind(module)]
            module.forward = _candidates(module, fused)[number]  # type: ignore[method-assign]
    return {kind[0].__name__: "Liger's" if fused else "ours" for kind, (fused, _) in proven.items()}


def explain_fused(replaced: Mapping[str, str]) -> str:
    """Which classes were replaced (replace_frozen) by whose code, in a few words."""
    by: dict[str, list[str]] = {}
    for name, whose in sorted(replaced.items()):
        by.setdefault(whose, []).append(name)
    return "; ".join(f"{whose} for {', '.join(names)}" for whose, names in by.items()) or "none, the family's own run"


def _ways(impl: str, like: Tensor) -> list[bool]:
    """What is tried for tensors like that, the fastest first: Liger's kernels (True), this file's own (False)."""
    ways = [True] if liger.available(impl, like.device, like.dtype) else []
    return ways + ([False] if _served(like.device, like.dtype) else [])


_Kind = tuple[type, frozenset[str]]


def _kind(module: nn.Module) -> _Kind:
    """What modules must share to be replaced alike: some norms of a class have no weight."""
    return type(module), frozenset(name for name, _ in module.named_parameters())


def _takes_one(module: nn.Module) -> bool:
    """Whether the module's forward takes one tensor and nothing else: some norms take a gate as well."""
    return len(inspect.signature(module.forward).parameters) == 1
