"""PTP-RN: normal noise on the input embeddings (also R3F's and SMART's start)."""

from torch import Tensor

from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb.noise import Noise
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.perturb.shared_pass import SharedPass


def gaussian(
    shared: SharedPass | None, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise
) -> Tensor:
    """delta ~ N(0, (sigma m)^2 / H) per coordinate: a token's delta has root-mean-square l2 norm sigma * m."""
    width = clean_TH.shape[-1]
    return noise.normal(row, width, scale=settings.sigma * settings.unit / width**0.5)
