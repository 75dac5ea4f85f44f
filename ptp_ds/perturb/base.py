"""What a perturbation is given: settings, its noise, and, where it is adversarial, the clean pass to climb from."""

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


class CleanPass:
    """Prompt and clean stream, passed once with their graph kept; later passes run on its cached trunk.

    Ascent steps take delta's gradient alone: none for the prompt, and no pass over its tokens. The last perturbed pass
    is differentiated down to the cached keys, values and clean scores, and `surrogate` carries that gradient into the
    kept graph. So a step costs one pass over the prompt and K + 2 over the rows, forward and backward.
    """

    def __init__(self, forward: Callable[..., Tensor], backbone: Backbone, row: PackedRow, clean_TH: Tensor) -> None:
        self.backbone, self.row, self.clean_TH = backbone, row, clean_TH
        self._graph_trunk: TrunkCache = {}
        self._graph_scores = forward(row, clean_TH, self._graph_trunk)[0]
        self.scores_BC = self._graph_scores.detach().requires_grad_()
        self._trunk = {
            layer: (keys.detach().requires_grad_(), values.detach().requires_grad_())
            for layer, (keys, values) in self._graph_trunk.items()
        }
        self._fixed_trunk = {layer: (keys.detach(), values.detach()) for layer, (keys, values) in self._trunk.items()}

    def gradient(self, delta_TH: Tensor, divergence: str) -> Tensor:
        """[T, H] fp32 gradient of the summed divergence at `delta_TH` (summed: rows don't depend on each other)."""
        delta = delta_TH.detach().requires_grad_()
        scores = self._perturbed(delta, self._fixed_trunk)
        objective = divergence_sum(divergence, self.scores_BC.detach(), scores, self.row.gold)
        return torch.autograd.grad(objective, delta)[0].float()

    def perturbed(self, delta_TH: Tensor) -> Tensor:
        """[B, C] scores at clean + delta, with gradient to the cached trunk."""
        return self._perturbed(delta_TH, self._trunk)

    def _perturbed(self, delta_TH: Tensor, trunk: TrunkCache) -> Tensor:
        return self.backbone.score(self.row, self.clean_TH + delta_TH.to(self.clean_TH.dtype), trunk=trunk)[0]

    def surrogate(self, total: Tensor) -> Tensor:
        """A scalar whose gradient with respect to the prompt is that of `total`; its value means nothing."""
        leaves = [self.scores_BC, *(tensor for pair in self._trunk.values() for tensor in pair)]
        graph = [self._graph_scores, *(tensor for pair in self._graph_trunk.values() for tensor in pair)]
        gradients = torch.autograd.grad(total, leaves)
        present = torch.isfinite(graph[0])  # absent candidates score -inf
        terms = [(torch.where(present, graph[0], 0.0) * gradients[0]).sum()]
        terms += [(tensor * gradient).sum() for tensor, gradient in zip(graph[1:], gradients[1:], strict=True)]
        return torch.stack([term.float() for term in terms]).sum()


@dataclass(frozen=True)
class Perturbation:
    """find(clean_pass, row, clean_TH, settings, noise) -> delta_TH. adversarial: whether it needs a CleanPass."""

    find: Callable[[CleanPass | None, PackedRow, Tensor, PerturbSettings, Noise], Tensor]
    adversarial: bool
