"""Ascent on the divergence: where it starts, and one step of it within the ball."""

from torch import Tensor

from ptp_ds.kernels import perturb_step
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb.ball import radius_of
from ptp_ds.perturb.noise import Noise
from ptp_ds.perturb.settings import PerturbSettings


def start_delta(row: PackedRow, width: int, settings: PerturbSettings, noise: Noise) -> Tensor:
    """[T, width] a random point of the ball, zero where nothing may move: where ascent begins.

    Half of the radius in the ball's norm, or uniform in the cube. Never zero: the gradient of a divergence at delta = 0
    is exactly zero (VAT), so ascent can't start there.
    """
    radius = radius_of(settings.norm, settings.epsilon * settings.unit, width)
    if settings.norm == "linf":
        return noise.uniform(row, width, "start", radius)
    return noise.uniform(row, width, "start", 0.5 * radius, settings.norm)


def ascend(delta_TH: Tensor, gradient_TH: Tensor, row: PackedRow, settings: PerturbSettings) -> Tensor:
    """delta after one step of length alpha along the steepest direction, projected into the ball."""
    return moved_delta(delta_TH.detach(), gradient_TH, row, settings)[0]


def moved_delta(
    delta_TH: Tensor, gradient_TH: Tensor, row: PackedRow, settings: PerturbSettings, embeds_TH: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(delta after a step of ascent, the input embeddings that it moved, where there are any)."""
    width = delta_TH.shape[1]
    radius, length = (
        radius_of(settings.norm, size * settings.unit, width) for size in (settings.epsilon, settings.alpha)
    )
    return perturb_step(
        delta_TH, gradient_TH, row.places, norm=settings.norm, radius=radius, length=length, embeds_TH=embeds_TH,
        impl=settings.kernels,
    )  # fmt: skip
