"""What is summed up between two log lines, on the device: the only host sync of training is its `reduce`."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptp_ds.ranks.distributed import Ranks

if TYPE_CHECKING:
    from ptp_ds.training.step import StepLoss

_WHAT, _NEVER = ("loss", "prompt's gradient"), torch.iinfo(torch.int64).max
Shares = dict[str, tuple[float, float]]  # by name: a sum, and the sum that it is a share of


@dataclass(frozen=True)
class Window:
    """Means over the examples since the last log line, over all ranks. broken: what first was not finite, the loss or
    the prompt's gradient, and at which step, counted from 1; None where all was.

    shares: what attacks told, each a sum over another, 0 where there was nothing to share.
    """

    values: dict[str, float]
    shares: dict[str, float]
    broken: tuple[str, int] | None
    step_seconds: float
    tokens_per_second: float


class Meter:
    """Sums on the device between log lines; nothing is read back until `reduce`, the only host sync."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._steps: set[int] = set()
        self._sums = torch.zeros(7, dtype=torch.float64, device=ranks.device)
        self._counts = False  # whether steps say how many rows' divergence counts
        self._broken = [torch.full((1,), _NEVER, device=ranks.device) for _ in _WHAT]  # the first step of each
        self._shares: dict[str, list[float]] = {}
        self._clock = time.perf_counter()

    def restart_clock(self) -> None:
        """Leaves evaluation and saving out of the next window's time."""
        self._clock = time.perf_counter()

    def add(self, loss: "StepLoss", examples: int, step: int, shares: Shares, broken: Tensor | bool) -> None:
        """Adds one step's sums over `examples`, without a host sync; shares: the same names on all ranks. broken: see
        Engine.
        """
        self._steps.add(step)
        for name, pair in shares.items():
            held = self._shares.get(name, (0.0, 0.0))
            self._shares[name] = [total + part for total, part in zip(held, pair, strict=True)]
        parts = (loss.total, loss.cross_entropy, loss.divergence, loss.delta_norm)
        self._sums[:4] += torch.stack([part.detach().double() for part in parts])
        self._sums[4] += examples
        self._sums[5] += loss.tokens
        if loss.counted is not None:
            self._counts = True
            self._sums[6] += loss.counted
        for first, found in zip(self._broken, (~torch.isfinite(loss.total), broken), strict=True):
            first.copy_(torch.where(found & (first == _NEVER), step, first))

    def reduce(self) -> Window:
        """The window's means over all ranks, and a fresh window; all ranks must call it."""
        firsts = (-self.ranks.max(-torch.cat(self._broken))).tolist()
        first, what = min(zip(firsts, _WHAT, strict=True))  # of one step: the loss, whose gradient follows it
        sums = self.ranks.sum(self._sums).tolist()
        seconds = (time.perf_counter() - self._clock) / max(1, len(self._steps))
        count = max(1.0, sums[4])
        names = ("loss", "cross_entropy", "divergence", "delta_norm")
        values = {name: total / count for name, total in zip(names, sums, strict=False)}
        rate = sums[5] / max(1, len(self._steps)) / seconds
        broken = None if first == _NEVER else (what, first + 1)
        shares = self._reduced_shares()
        if self._counts:
            shares["confident_share"] = sums[6] / count
        self._steps.clear()
        self._sums = torch.zeros_like(self._sums)
        self.restart_clock()
        return Window(values, shares, broken, seconds, rate)

    def _reduced_shares(self) -> dict[str, float]:
        if not self._shares:
            return {}
        pairs = torch.tensor(list(self._shares.values()), dtype=torch.float64, device=self.ranks.device)
        reduced = zip(self._shares, self.ranks.sum(pairs).tolist(), strict=True)
        self._shares = {}
        return {name: part / whole if whole else 0.0 for name, (part, whole) in reduced}
