"""What a perturbation is given: settings, its noise, and the ascent's cheap passes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptp_ds.backbone import Backbone, TrunkCache
from ptp_ds.objective import divergence_sum
from ptp_ds.packing import PackedRow
from ptp_ds.seeding import make_generator


@dataclass(frozen=True, kw_only=True)
class PerturbSettings:
    """sigma, epsilon, alpha are in units of `unit`, the backbone's mean embedding norm.

    sigma: root-mean-square l2 norm of a noisy token's delta. epsilon: radius of the ball (see perturb.ball for each
    norm). alpha: length of an ascent step. steps: K ascent steps. divergence: what the ascent climbs.
    """

    unit: float
    sigma: float
    epsilon: float
    alpha: float
    steps: int
    norm: str
    divergence: str


@dataclass(frozen=True)
class Noise:
    """Random numbers of one optimizer step: drawn per example from (seed, purpose, step, example number).

    The same example in the same step gets the same noise on any rank, in any micro-batch, at any place of the row.
    """

    seed: int
    step: int

    def _per_example(self, row: PackedRow, width: int, purpose: str, fill: Callable) -> Tensor:
        device = row.token_ids.device
        parts = []
        for example, length in zip(row.example_ids, row.lengths, strict=True):
            generator = make_generator(self.seed, purpose, self.step, example, device=device)
            parts.append(fill(torch.empty(length, width, device=device), generator))
        return torch.cat(parts)

    def normal(self, row: PackedRow, width: int, purpose: str = "noise") -> Tensor:
        """[T, width] fp32 standard normal numbers."""
        return self._per_example(row, width, purpose, lambda out, gen: out.normal_(generator=gen))

    def uniform(self, row: PackedRow, width: int, purpose: str = "noise") -> Tensor:
        """[T, width] fp32 numbers, uniform in [-1, 1)."""
        return self._per_example(row, width, purpose, lambda out, gen: out.uniform_(-1.0, 1.0, generator=gen))


class Ascent:
    """Passes for adversarial perturbations: the prompt's keys and the clean prediction are computed once, without
    gradient, and only delta's gradient is taken afterwards; the prompt's tokens are never passed again."""

    def __init__(self, backbone: Backbone, prompt_PH: Tensor, row: PackedRow, clean_TH: Tensor) -> None:
        self.backbone, self.row, self.clean_TH = backbone, row, clean_TH
        self.trunk: TrunkCache = {}
        with torch.no_grad():
            self.clean_BC = backbone.score(row, clean_TH, prompt_PH.detach(), record=self.trunk)[0]

    def gradient(self, delta_TH: Tensor, divergence: str) -> Tensor:
        """[T, H] fp32 gradient of the summed divergence at `delta_TH` (summed: rows don't depend on each other)."""
        delta = delta_TH.detach().requires_grad_()
        scores = self.backbone.score(self.row, self.clean_TH + delta.to(self.clean_TH.dtype), trunk=self.trunk)[0]
        objective = divergence_sum(divergence, self.clean_BC, scores, self.row.gold)
        return torch.autograd.grad(objective, delta)[0].float()


Perturbation = Callable[[Callable[[], Ascent], PackedRow, Tensor, PerturbSettings, Noise], Tensor]
