"""PTP-ADV: K steps of projected gradient ascent on the divergence, from a random start (Madry et al. 2018)."""

from torch import Tensor

from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb.ascent import start_delta
from ptp_ds.perturb.noise import Noise
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.perturb.shared_pass import SharedPass


def pgd_start(
    shared: SharedPass | None, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise
) -> Tensor:
    """Where pgd begins: a random point of the ball."""
    return start_delta(row, clean_TH.shape[-1], settings, noise)


def pgd(shared: SharedPass | None, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise) -> Tensor:
    """K times: delta <- project(delta + alpha * steepest(gradient of D(x, x + delta))); ||delta|| <= epsilon."""
    assert shared is not None
    delta = pgd_start(shared, row, clean_TH, settings, noise)
    for _ in range(settings.steps):
        delta = shared.ascend(delta, settings)
    return delta
