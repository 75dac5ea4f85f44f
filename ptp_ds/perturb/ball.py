"""Balls around zero for delta: norms, steepest steps and projections, all on packed [T, H] rows.

norm        ball                                                    radius, in mean embedding norms m
frobenius   per example: l2 norm over all its tokens and widths     epsilon * m, whatever the row's length (FreeLB)
token_l2    per token: l2 norm over widths                          epsilon * m
linf        per coordinate: absolute value                          epsilon * m / sqrt(H): a token's l2 <= epsilon * m
"""

import torch
from torch import Tensor

from ptp_ds.packing import PackedRow

NORMS = ("frobenius", "token_l2", "linf")
_TINY = 1e-30


def example_norm(delta_TH: Tensor, row: PackedRow) -> Tensor:
    """[B] fp32 Frobenius norm of each example's rows of delta."""
    squares = delta_TH.float().square().sum(-1)
    total = squares.new_zeros(len(row.lengths)).index_add_(0, row.example_of, squares)
    return total.sqrt()


def radius_of(norm: str, radius: float, width: int) -> float:
    """The radius in the ball's own norm; `radius` is epsilon (or alpha) times the mean embedding norm."""
    return radius / width**0.5 if norm == "linf" else radius


def project(delta_TH: Tensor, row: PackedRow, norm: str, radius: float) -> Tensor:
    """The nearest point of the ball of `radius` (in mean embedding norms times m; see the module's table)."""
    bound = radius_of(norm, radius, delta_TH.shape[-1])
    if norm == "linf":
        return delta_TH.clamp(-bound, bound)
    if norm == "token_l2":
        size = delta_TH.norm(dim=-1, keepdim=True)
    elif norm == "frobenius":
        size = example_norm(delta_TH, row)[row.example_of, None]
    else:
        raise ValueError(f"Unknown norm {norm!r}; choose from {', '.join(NORMS)}.")
    # A hair inside, so that rounding never leaves a delta outside its ball.
    return delta_TH * (bound * (1 - 1e-6) / size.clamp_min(_TINY)).clamp_max(1.0)


def steepest(gradient_TH: Tensor, row: PackedRow, norm: str, length: float) -> Tensor:
    """The step of `length` in the ball's norm that raises the objective most; zero where the gradient is zero."""
    bound = radius_of(norm, length, gradient_TH.shape[-1])
    if norm == "linf":
        return bound * gradient_TH.sign()
    if norm == "token_l2":
        size = gradient_TH.norm(dim=-1, keepdim=True)
    else:
        size = example_norm(gradient_TH, row)[row.example_of, None]
    return gradient_TH * (bound / size.clamp_min(_TINY))


def random_start(uniform_TH: Tensor, row: PackedRow, norm: str, radius: float) -> Tensor:
    """A point of the ball from numbers uniform in [-1, 1): half of the radius in the ball's norm.

    Never zero: the gradient of a divergence at delta = 0 is exactly zero (VAT), so ascent can't start there.
    """
    if norm == "linf":
        return uniform_TH * radius_of(norm, radius, uniform_TH.shape[-1])
    return steepest(uniform_TH, row, norm, 0.5 * radius)


def movable_only(delta_TH: Tensor, row: PackedRow) -> Tensor:
    """delta with zero on special, template and answer tokens."""
    return torch.where(row.movable[:, None], delta_TH, 0.0)
