"""PTP-ADV: K steps of projected gradient ascent on the divergence, from a random start (Madry et al. 2018)."""

from torch import Tensor

from ptp_ds.packing import PackedRow
from ptp_ds.perturb.ball import movable_only, project, random_start, steepest
from ptp_ds.perturb.base import Noise, PerturbSettings, SharedPass


def pgd(shared: SharedPass, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise) -> Tensor:
    """K times: delta <- project(delta + alpha * steepest(gradient of D(x, x + delta))); ||delta|| <= epsilon."""
    radius, length = settings.epsilon * settings.unit, settings.alpha * settings.unit
    start = movable_only(noise.uniform(row, clean_TH.shape[-1], "start"), row)
    delta = project(random_start(start, row, settings.norm, radius), row, settings.norm, radius)
    for _ in range(settings.steps):
        gradient = movable_only(shared.gradient(delta, settings.divergence), row)
        delta = project(delta + steepest(gradient, row, settings.norm, length), row, settings.norm, radius)
    return delta
