"""The objective of both streams in one pass: cross-entropy of the clean one plus lambda times a divergence.

    total = 1/count sum_b [ ce_weight CE(p_b, y_b) + reg_weight D(p_b, q_b) ],  p, q: softmax of clean, perturbed scores

With a = log p, b = log q, m = log((p + q) / 2) and E_p[x] = sum p x, the gradients to clean and perturbed scores are

    CE       p - onehot(y)                       0
    kl       p (a - b - E_p[a - b])              q - p
    sym_kl   the sum of kl and of kl with the streams exchanged
    js       p (a - m - E_p[a - m]) / 2          q (b - m - E_q[b - m]) / 2
    ce       0                                   q - onehot(y)

With the clean prediction as a constant for D (clean_fixed), D's column for clean is 0; sym_kl's for perturbed stays.
With a least confidence, D and its gradients are 0 in rows whose likeliest clean candidate, or whose label's, is less
probable than that.

The reference is ptp_ds.objective. Scores of hidden states are a product with the verbalizers' rows of the head
(ptp_ds.backbone.verbalizers), so nothing of the vocabulary's size is made for either.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ptp_ds.kernels.choice import block_of, jit, tl, use_triton, warps_of
from ptp_ds.objective import DIVERGENCES, cross_entropy_sum, divergence_sum

_CODES = {"kl": 0, "sym_kl": 1, "js": 2, "ce": 3}


class DualLoss(NamedTuple):
    """total carries the gradient; cross_entropy and divergence are sums over examples, for the log."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def dual_divergence(
    clean_BC: Tensor, perturbed_BC: Tensor, gold_B: Tensor, kind: str, *, reg_weight: float, ce_weight: float = 1.0,
    count: int = 1, clean_fixed: bool = False, min_confidence: float = 0.0, of_label: bool = False, impl: str = "auto",
) -> DualLoss:  # fmt: skip
    """The module's total over candidate scores, -inf where a candidate is absent, with gradient to both streams.

    kind: see ptp_ds.objective.DIVERGENCES. clean_fixed: whether the clean stream is a constant for D. count: examples
    of the optimizer step on all ranks, or 1 for a sum. min_confidence, of_label: see
    ptp_ds.objective.divergence_sum. Raises ValueError for another kind.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"Unknown divergence {kind!r}; choose from {', '.join(DIVERGENCES)}.")
    if use_triton(impl, clean_BC, perturbed_BC):
        weights = ce_weight / count, reg_weight / count
        how = clean_fixed, min_confidence, of_label
        total, sums = _DualDivergence.apply(clean_BC, perturbed_BC, gold_B, kind, *weights, *how)
        return DualLoss(total, sums[0], sums[1])
    cross_entropy = cross_entropy_sum(clean_BC, gold_B)
    divergence = divergence_sum(kind, clean_BC, perturbed_BC, gold_B, clean_fixed, min_confidence, of_label)
    total = (ce_weight / count) * cross_entropy if ce_weight else torch.zeros_like(cross_entropy)
    return DualLoss(total + (reg_weight / count) * divergence, cross_entropy.detach(), divergence.detach())


@jit
def _log_softmax(x, present):
    """(log-softmax over the last axis, its exponential), both 0 where absent."""
    x = tl.where(present, x, float("-inf"))
    x = x - tl.max(x, 1)[:, None]
    logs = x - tl.log(tl.sum(tl.exp(x), 1))[:, None]
    return tl.where(present, logs, 0.0), tl.where(present, tl.exp(logs), 0.0)


@jit
def _dual_kernel(
    clean,  # [B, C]
    perturbed,  # [B, C]
    gold,  # [B]
    losses,  # [2, B]: cross-entropy, divergence
    to_clean,  # [B, C] fp32
    to_perturbed,  # [B, C] fp32
    B, C, clean_stride, perturbed_stride, ce_weight, reg_weight, least, KIND: tl.constexpr, FIXED: tl.constexpr,
    LABEL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS examples: their losses and the gradients of the weighted sum."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    real = (rows < B)[:, None] & (columns < C)[None, :]
    x = tl.load(clean + rows[:, None] * clean_stride + columns[None, :], mask=real, other=0.0).to(tl.float32)
    y = tl.load(perturbed + rows[:, None] * perturbed_stride + columns[None, :], mask=real, other=0.0).to(tl.float32)
    present = real & (x != float("-inf"))
    a, p = _log_softmax(x, present)
    b, q = _log_softmax(y, present)
    right = (columns[None, :] == tl.load(gold + rows, mask=rows < B, other=0)[:, None]).to(tl.float32)
    ce = -tl.sum(right * a, 1)
    sure = tl.sum(right * p, 1) if LABEL else tl.max(p, 1)
    weight = tl.where(sure < least, 0.0, reg_weight)[:, None]
    to_a = ce_weight * (p - tl.where(present, right, 0.0))
    if KIND == 3:
        divergence = -tl.sum(right * b, 1)
        to_b = q - tl.where(present, right, 0.0)
    elif KIND == 2:
        top = tl.maximum(a, b)
        m = top + tl.log(tl.exp(a - top) + tl.exp(b - top)) - 0.6931471805599453
        gap_a, gap_b = a - m, b - m
        mean_a, mean_b = tl.sum(p * gap_a, 1), tl.sum(q * gap_b, 1)
        divergence = 0.5 * (mean_a + mean_b)
        if not FIXED:
            to_a += weight * 0.5 * p * (gap_a - mean_a[:, None])
        to_b = 0.5 * q * (gap_b - mean_b[:, None])
    else:
        gap = a - b
        divergence = tl.sum(p * gap, 1)
        if not FIXED:
            to_a += weight * p * (gap - divergence[:, None])
        to_b = q - p
        if KIND == 1:
            back = -tl.sum(q * gap, 1)
            if not FIXED:
                to_a += weight * (p - q)
            to_b += q * (-gap - back[:, None])
            divergence += back
    tl.store(losses + rows, ce, mask=rows < B)
    tl.store(losses + B + rows, tl.where(sure < least, 0.0, divergence), mask=rows < B)
    at = rows[:, None] * C + columns[None, :]
    tl.store(to_clean + at, to_a, mask=real)
    tl.store(to_perturbed + at, weight * to_b, mask=real)


class _DualDivergence(torch.autograd.Function):
    """Gradients are found beside the losses, and multiplied by the output's own in backward."""

    @staticmethod
    def forward(ctx, clean, perturbed, gold, kind, ce_weight, reg_weight, fixed, least, of_label):  # type: ignore[override]
        examples, candidates = clean.shape
        clean, perturbed = (x if x.stride(-1) == 1 else x.contiguous() for x in (clean, perturbed))
        losses = torch.empty(2, examples, device=clean.device)
        gradients = torch.empty(2, examples, candidates, device=clean.device)
        block = block_of(candidates, 1 << 20)
        rows = max(1, min(block_of(examples, 64), 1024 // block))
        _dual_kernel[(-(-examples // rows),)](
            clean, perturbed, gold, losses, *gradients, examples, candidates, clean.stride(0), perturbed.stride(0),
            ce_weight, reg_weight, least, KIND=_CODES[kind], FIXED=fixed, LABEL=of_label,
            ROWS=rows, BLOCK=block, num_warps=warps_of(rows * block),
        )  # fmt: skip
        ctx.save_for_backward(gradients)
        ctx.dtypes = clean.dtype, perturbed.dtype
        sums = losses.sum(1)
        ctx.mark_non_differentiable(sums)
        return ce_weight * sums[0] + reg_weight * sums[1], sums

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[override]
        found = [
            (grad * gradient).to(dtype) if needed else None
            for gradient, dtype, needed in zip(ctx.saved_tensors[0], ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        ]
        return *found, None, None, None, None, None, None, None
