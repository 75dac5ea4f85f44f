"""Log-probabilities of a few tokens among a vocabulary, without a second matrix of its size in fp32.

A plain log_softmax over [N, V] in fp32 leaves three or four of them at once, with V = 128k and long answers more than
the layers keep. Here rows are taken some at a time, forward and backward; what is kept is the logits themselves and one
number a row.
"""

import torch
from torch import Tensor

from ptp_ds.kernels.places import add_at
from ptp_ds.precision import at_least_fp32

_NUMBERS = 1 << 24  # fp32 numbers of a part: 64 MiB


def picked_log_probs(logits_NV: Tensor, pick_row_M: Tensor, pick_token_M: Tensor) -> Tensor:
    """[M] log-softmax(logits)[pick_row, pick_token] in fp32 or better; a place may be picked more than once."""
    return _PickedLogProbs.apply(logits_NV, pick_row_M, pick_token_M)


class _PickedLogProbs(torch.autograd.Function):
    """With z the logits, p their softmax and g the gradient of pick m: dz[n] = sum_{m at n} g[m] (onehot - p[n])."""

    @staticmethod
    def forward(ctx, logits, rows, tokens):  # type: ignore[override]
        parts = [torch.logsumexp(at_least_fp32(part), dim=-1) for part in _parts(logits)]
        normaliser = torch.cat(parts)
        ctx.save_for_backward(logits, rows, tokens, normaliser)
        return at_least_fp32(logits[rows, tokens]) - normaliser[rows]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        logits, rows, tokens, normaliser = ctx.saved_tensors
        of_rows = add_at(torch.zeros_like(normaliser), rows, grad)
        found, start = torch.empty_like(logits), 0
        for part, out in zip(_parts(logits), _parts(found), strict=True):
            count = part.shape[0]
            stop = start + count
            weights = (part - normaliser[start:stop, None]).contiguous().exp_().mul_(-of_rows[start:stop, None])
            inside = (rows >= start) & (rows < stop)
            here = torch.where(inside, rows - start, 0) * part.shape[1] + tokens
            add_at(weights.view(-1), here, torch.where(inside, grad, 0.0))
            out.copy_(weights)
            start = stop
        return found, None, None


def _parts(x_NV: Tensor) -> tuple[Tensor, ...]:
    """Runs of rows, each with at most _NUMBERS numbers, or one row."""
    return x_NV.split(max(1, _NUMBERS // max(1, x_NV.shape[-1])))
