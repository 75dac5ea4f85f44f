"""Random numbers for deltas, the same for an example wherever it lies; ptp_ds.kernels.noise draws them."""

from dataclasses import dataclass

from torch import Tensor

from ptp_ds.kernels import noise
from ptp_ds.packing.row import PackedRow
from ptp_ds.seeding import derive_seed


@dataclass(frozen=True)
class Noise:
    """Random numbers of one optimizer step: those of (seed, purpose, step, example number), see ptp_ds.kernels.noise.

    The same example in the same step gets the same noise on any rank, in any micro-batch, at any place of the row.
    kernels: which implementation draws them.
    """

    seed: int
    step: int
    kernels: str = "auto"

    def normal(self, row: PackedRow, width: int, purpose: str = "noise", scale: float = 1.0) -> Tensor:
        """[T, width] fp32 normal numbers of deviation `scale`, zero on tokens that may not move."""
        return self._draw("normal", row, width, purpose, scale)

    def uniform(
        self, row: PackedRow, width: int, purpose: str = "noise", scale: float = 1.0, norm: str | None = None
    ) -> Tensor:
        """[T, width] fp32 numbers, uniform in [-scale, scale), zero on tokens that may not move.

        norm: instead scaled so that each example ("frobenius") or token ("token_l2") has norm `scale`.
        """
        return self._draw("uniform", row, width, purpose, scale, norm)

    def _draw(
        self, kind: str, row: PackedRow, width: int, purpose: str, scale: float, norm: str | None = None
    ) -> Tensor:
        key = derive_seed(self.seed, purpose)
        return noise(kind, key, self.step, row.places, width, scale, norm=norm, impl=self.kernels)
