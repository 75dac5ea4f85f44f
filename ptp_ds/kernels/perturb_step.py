"""One step of projected ascent on delta over a packed row, and the input embeddings that it moves.

    delta' = project(delta + length * steepest(gradient)),  input = embedding + delta'  in the backbone's dtype

norm        steepest(g)      ball                                    taken over
frobenius   g / ||g||_2      ||delta||_2 <= radius                   an example's tokens and widths
token_l2    g / ||g||_2      ||delta||_2 <= radius                   a token's widths
linf        sign(g)          |delta| <= radius in each coordinate    -

Only movable tokens move; the rest of delta is zero. Sources: Madry et al. 2018 (PGD), Zhu et al. 2020 (FreeLB's norm).
"""

import torch
from torch import Tensor

from ptp_ds.choices import NORMS
from ptp_ds.kernels.choice import block_of, jit, tl, use_triton, warps_of
from ptp_ds.kernels.places import Places

INSIDE = 1 - 4e-6  # of the radius: rounding, of the kernel's norms too, never leaves a delta outside its ball
_TINY = 1e-30
_NONE = 1e-15  # l2 norm below which a gradient is none: its square, 1e-30, is still exact in fp32
_SPLIT = 16  # programs that share an example's sums


def perturb_step(
    delta_TH: Tensor, gradient_TH: Tensor, places: Places, *, norm: str, radius: float, length: float,
    embeds_TH: Tensor | None = None, impl: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(delta' [T, H], embeds + delta' [T, H] in embeds' dtype, or None without embeds); none has a graph.

    delta in fp32 or fp64, gradient in any dtype. radius, length: l2 norms, or for linf the largest absolute value of a
    coordinate. A delta stays where it is where the gradient is none (l2 norms below 1e-15), and is NaN where it isn't
    finite: that of the example, of the token or of the coordinate, by the norm. Raises ValueError for another norm.
    """
    if norm not in NORMS:
        raise ValueError(f"Unknown norm {norm!r}; choose from {', '.join(NORMS)}.")
    given = [delta_TH, gradient_TH] if embeds_TH is None else [delta_TH, gradient_TH, embeds_TH]
    with torch.no_grad():
        if use_triton(impl, *given) and delta_TH.dtype == torch.float32:
            return _step_triton(delta_TH, gradient_TH, places, norm, radius, length, embeds_TH)
        moved = torch.where(places.movable[:, None], gradient_TH.to(delta_TH.dtype), 0.0)
        step = steepest(moved, places, norm, length)
        kept = torch.where(places.movable[:, None], delta_TH, 0.0)
        delta = project(kept + step, places, norm, radius)
        return delta, None if embeds_TH is None else add_delta(embeds_TH, delta, places.source)


def add_delta(embeds_TH: Tensor, delta_TH: Tensor, source_T: Tensor | None = None) -> Tensor:
    """[T, H] embeds + delta in embeds' dtype, rounded once. source_T: the token whose delta each token takes."""
    delta = delta_TH if source_T is None else delta_TH.index_select(0, source_T)
    return (embeds_TH + delta).to(embeds_TH.dtype)


def example_norm(delta_TH: Tensor, places: Places) -> Tensor:
    """[B] Frobenius norm of each example's rows, in fp32 or better."""
    squares = delta_TH.to(torch.promote_types(delta_TH.dtype, torch.float32)).square().sum(-1)
    return places.sums(squares).sqrt()


def _size(x_TH: Tensor, places: Places, norm: str) -> Tensor:
    """[T, 1] l2 norm of each token, or of its example."""
    if norm == "token_l2":
        return x_TH.norm(dim=-1, keepdim=True)
    return example_norm(x_TH, places)[places.example_of, None]


def steepest(gradient_TH: Tensor, places: Places, norm: str, length: float) -> Tensor:
    """The step of `length` that raises the objective most; zero where the gradient is none."""
    if norm == "linf":
        return length * torch.where(gradient_TH.isnan(), gradient_TH, gradient_TH.sign())  # sign hides NaN
    size = _size(gradient_TH, places, norm)
    return gradient_TH * torch.where(size < _NONE, 0.0, length / size)  # a size of NaN stays NaN


def project(delta_TH: Tensor, places: Places, norm: str, radius: float) -> Tensor:
    """The nearest point of the ball of `radius`."""
    if norm == "linf":
        return delta_TH.clamp(-radius, radius)
    return delta_TH * (radius * INSIDE / _size(delta_TH, places, norm).clamp_min(_TINY)).clamp_max(1.0)


@jit
def _sums_kernel(
    gradient,  # [T, H]
    delta,  # [T, H] fp32
    movable,  # [T] uint8
    starts,  # [B + 1]
    sums,  # [B, 3, SPLIT]: of g^2, g delta, delta^2
    H, row_stride, SPLIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """An example's movable tokens, every SPLIT-th run of BLOCK_T of them."""
    example, part = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts + example), tl.load(starts + example + 1)
    gg = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    gd = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dd = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in range(first + part * BLOCK_T, last, SPLIT * BLOCK_T):
        token = start + tl.arange(0, BLOCK_T).to(tl.int64)
        moves = tl.load(movable + token, mask=token < last, other=0) != 0
        for column in range(0, H, BLOCK_H):
            columns = column + tl.arange(0, BLOCK_H)
            inside = moves[:, None] & (columns < H)[None, :]
            g = tl.load(gradient + token[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)
            d = tl.load(delta + token[:, None] * H + columns[None, :], mask=inside, other=0.0)
            g = g.to(tl.float32)
            gg += g * g
            gd += g * d
            dd += d * d
    at = sums + example * 3 * SPLIT + part
    tl.store(at, tl.sum(gg))
    tl.store(at + SPLIT, tl.sum(gd))
    tl.store(at + 2 * SPLIT, tl.sum(dd))


@jit
def _factors(gg, gd, dd, length, ball):
    """(s, f): delta' = f (delta + s gradient). ||delta + s g||^2 = delta^2 + 2 s g delta + s^2 g^2."""
    s = tl.where(gg < 1e-30, 0.0, length / tl.sqrt(gg))  # _NONE: below it squares, and so the moved size, underflow
    squares = dd + 2.0 * (s * gd) + s * (s * gg)  # s * s may be infinite
    size = tl.sqrt(tl.maximum(squares, 1e-30, propagate_nan=tl.PropagateNan.ALL))
    return s, tl.minimum(ball / size, 1.0, propagate_nan=tl.PropagateNan.ALL)


@jit
def _move_kernel(
    gradient,  # [T, H]
    delta,  # [T, H] fp32
    embeds,  # [T, H], or unused
    movable,  # [T] uint8
    source,  # [T], or unused
    example_of,  # [T]
    sums,  # [B, 3, SPLIT], read for a frobenius norm
    new_delta,  # [T, H] fp32
    moved,  # [T, H] in embeds' dtype, or unused
    H, row_stride, length, ball, NORM: tl.constexpr, EMBEDS: tl.constexpr, SOURCE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One token, or BLOCK_H columns of it. A token that takes another's delta computes that one's again."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    taken = token
    if SOURCE:
        taken = tl.load(source + token)
    moves = tl.load(movable + taken) != 0
    inside = (columns < H) & moves
    g = tl.load(gradient + taken * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(delta + taken * H + columns, mask=inside, other=0.0)
    if NORM == 2:  # linf
        d += tl.where(g > 0, length, tl.where(g < 0, -length, g))
        new = tl.clamp(d, -ball, ball, propagate_nan=tl.PropagateNan.ALL)
    else:
        if NORM == 1:  # token_l2
            s, f = _factors(tl.sum(g * g), tl.sum(g * d), tl.sum(d * d), length, ball)
        else:
            at = sums + tl.load(example_of + taken) * 3 * SPLIT + tl.arange(0, SPLIT)
            gg, gd, dd = tl.sum(tl.load(at)), tl.sum(tl.load(at + SPLIT)), tl.sum(tl.load(at + 2 * SPLIT))
            s, f = _factors(gg, gd, dd, length, ball)
        new = (d + s * g) * f
    new = tl.where(inside, new, 0.0)
    stays = columns < H
    if EMBEDS:
        e = tl.load(embeds + token * H + columns, mask=stays, other=0.0).to(tl.float32)
        tl.store(moved + token * H + columns, (e + new).to(moved.dtype.element_ty), mask=stays)
    if SOURCE:
        new = tl.where(taken == token, new, 0.0)
    tl.store(new_delta + token * H + columns, new, mask=stays)


def _step_triton(
    delta: Tensor, gradient: Tensor, places: Places, norm: str, radius: float, length: float, embeds: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    tokens, width = delta.shape
    delta = delta.contiguous()
    gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
    embeds = embeds.contiguous() if embeds is not None else None
    new_delta = torch.empty_like(delta)
    moved = torch.empty_like(embeds) if embeds is not None else None
    sums = delta.new_empty(places.examples, 3, _SPLIT)
    movable, stride = places.movable.view(torch.uint8), gradient.stride(0)
    if norm == "frobenius":
        _sums_kernel[places.examples, _SPLIT](
            gradient, delta, movable, places.starts, sums, width, stride, SPLIT=_SPLIT, BLOCK_T=4,
            BLOCK_H=block_of(width, 512),
        )  # fmt: skip
    block = block_of(width, 1 << 20 if norm == "token_l2" else 1024)
    ball = radius if norm == "linf" else radius * INSIDE
    _move_kernel[tokens, -(-width // block)](
        gradient, delta, delta if embeds is None else embeds, movable,
        movable if places.source is None else places.source, places.example_of, sums, new_delta,
        new_delta if moved is None else moved, width, stride, length, ball, NORM={"frobenius": 0, "token_l2": 1,
        "linf": 2}[norm], EMBEDS=embeds is not None, SOURCE=places.source is not None, SPLIT=_SPLIT, BLOCK_H=block,
        num_warps=warps_of(block),
    )  # fmt: skip
    return new_delta, moved
