"""PTP-RN with uniform noise (R3F's other choice), of the same root-mean-square size as the normal one."""

from torch import Tensor

from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb.noise import Noise
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.perturb.shared_pass import SharedPass


def uniform(
    shared: SharedPass | None, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise
) -> Tensor:
    """delta ~ U(-a, a) per coordinate with a = sigma m sqrt(3 / H)."""
    width = clean_TH.shape[-1]
    return noise.uniform(row, width, scale=settings.sigma * settings.unit * (3.0 / width) ** 0.5)
