"""Balls around zero for delta, on packed [T, H] rows, in units of the embeddings; see ptp_ds.kernels.perturb_step.

norm        ball                                                    radius, in mean embedding norms m
frobenius   per example: l2 norm over all its tokens and widths     epsilon * m, whatever the row's length (FreeLB)
token_l2    per token: l2 norm over widths                          epsilon * m
linf        per coordinate: absolute value                          epsilon * m / sqrt(H): a token's l2 <= epsilon * m
"""

import torch
from torch import Tensor

from ptp_ds.kernels.perturb_step import example_norm as norm_of_places
from ptp_ds.packing.row import PackedRow

__all__ = ["example_norm", "movable_only", "radius_of"]


def example_norm(delta_TH: Tensor, row: PackedRow) -> Tensor:
    """[B] Frobenius norm of each example's rows of delta, in fp32 or better."""
    return norm_of_places(delta_TH, row.places)


def radius_of(norm: str, radius: float, width: int) -> float:
    """The radius in the ball's own norm; `radius` is epsilon (or alpha) times the mean embedding norm."""
    return radius / width**0.5 if norm == "linf" else radius


def movable_only(delta_TH: Tensor, row: PackedRow) -> Tensor:
    """delta with zero on special, template and answer tokens."""
    return torch.where(row.movable[:, None], delta_TH, 0.0)
