"""The training objective: cross-entropy of the clean stream plus lambda times a divergence between the streams.

    loss = 1/B sum_b [ CE(f(P, x_b), y_b) + lambda * D(f(P, x_b), f(P, x_b + delta_b)) ]

f is the softmax over a row's candidates. Everything here returns sums over examples: the caller divides by the
global number of examples, so that ranks, micro-batches and batch sizes don't change lambda's meaning.

The divergence's gradient goes to both predictions, or, with the clean one as a constant for it, to the perturbed one
alone (VAT, Miyato et al. 2018): a strong perturbation then can't drag the clean one down to knowing nothing. Only
confident rows may count (UDA, Xie et al. 2020): there is no use in pulling towards a prediction that is a guess.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ptp_ds.precision import at_least_fp32


def log_probabilities(scores_BC: Tensor) -> Tensor:
    """[B, C] log-softmax over the candidates; -inf where a candidate does not exist."""
    return at_least_fp32(scores_BC).log_softmax(-1)


def cross_entropy_sum(scores_BC: Tensor, gold_B: Tensor) -> Tensor:
    """Sum over examples of -log p(gold), in nats."""
    return F.nll_loss(log_probabilities(scores_BC), gold_B, reduction="sum")


def _expected_gap(weights: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[B] exp(weights) * (left - right), where absent candidates (-inf everywhere) count nothing."""
    present = torch.isfinite(weights)
    gap = torch.where(present, left, 0.0) - torch.where(present, right, 0.0)
    return (weights.exp() * gap).sum(-1)


def kl(clean: Tensor, perturbed: Tensor, gold: Tensor) -> Tensor:
    """sum KL(clean || perturbed)."""
    return _expected_gap(clean, clean, perturbed)


def sym_kl(clean: Tensor, perturbed: Tensor, gold: Tensor) -> Tensor:
    """sum KL(clean || perturbed) + KL(perturbed || clean), as in R3F and SMART (no factor of 1/2)."""
    return _expected_gap(clean, clean, perturbed) + _expected_gap(perturbed, perturbed, clean)


def js(clean: Tensor, perturbed: Tensor, gold: Tensor) -> Tensor:
    """sum of Jensen-Shannon divergences, at most log 2 an example."""
    middle = torch.logaddexp(
        torch.where(torch.isfinite(clean), clean, -1e4), torch.where(torch.isfinite(clean), perturbed, -1e4)
    ) - math.log(2.0)
    return 0.5 * (_expected_gap(clean, clean, middle) + _expected_gap(perturbed, perturbed, middle))


def ce(clean: Tensor, perturbed: Tensor, gold: Tensor) -> Tensor:
    """sum of the perturbed stream's cross-entropy on the true label (FreeLB's objective beside the clean one)."""
    return F.nll_loss(perturbed, gold, reduction="none")


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl": kl, "sym_kl": sym_kl, "js": js, "ce": ce,
}  # fmt: skip


def confident(clean_BC: Tensor, least: float, label_B: Tensor | None = None) -> Tensor:
    """[B] whether the likeliest candidate, or the one that label_B names, has a probability of `least` or more."""
    log_BC = log_probabilities(clean_BC.detach())
    log_B = log_BC.amax(-1) if label_B is None else log_BC.gather(-1, label_B[:, None])[:, 0]
    return log_B.exp() >= least


def divergence_sum(
    kind: str, clean_BC: Tensor, perturbed_BC: Tensor, gold_B: Tensor, clean_fixed: bool = False,
    min_confidence: float = 0.0, of_label: bool = False,
) -> Tensor:  # fmt: skip
    """Sum over examples of a divergence between candidate scores. kind: see DIVERGENCES.

    Gradient flows to both, or with clean_fixed to the perturbed ones alone. min_confidence, of the likeliest
    candidate or of the label's: see `confident`; rows below it count nothing.
    """
    given = clean_BC.detach() if clean_fixed else clean_BC
    divergence_B = DIVERGENCES[kind](log_probabilities(given), log_probabilities(perturbed_BC), gold_B)
    if min_confidence > 0:
        sure_B = confident(clean_BC, min_confidence, gold_B if of_label else None)
        divergence_B = torch.where(sure_B, divergence_B, 0.0)
    return divergence_B.sum()
