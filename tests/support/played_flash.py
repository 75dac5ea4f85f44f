"""torch's variable-length flash kernels, played by plain loops on the host: what they promise, forward and backward."""

from itertools import pairwise

import torch


def sequences(part):
    """(query slice, key slice) of each of a part's sequences."""
    bounds = [cu.tolist() for cu in (part.cu_q, part.cu_k)]
    assert part.max_q == max(b - a for a, b in pairwise(bounds[0]))
    assert part.max_k == max(b - a for a, b in pairwise(bounds[1]))
    return [
        (slice(*q), slice(*k))
        for q, k in zip(*(pairwise(b) for b in bounds), strict=True)
    ]  # fmt: skip


def logits_of(q, k, part, scale):
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    return logits.masked_fill(~torch.ones(logits.shape[1:]).tril().bool(), float("-inf")) if part.causal else logits


def play_forward(q, k, v, part, scale):
    """What the kernel promises: each sequence's attention and its log-sum-exp [heads, T]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    outs, lses = [], []
    for asking, seen in sequences(part):
        logits = logits_of(q[asking], k[seen], part, scale)
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[seen]))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


def play_backward(grad, q, k, v, out, lse, part, scale):
    """FlashAttention's backward, with the output and log-sum-exp that it is given."""
    groups, heads = q.shape[1] // k.shape[1], k.shape[1]
    wide_k, wide_v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    for asking, seen in sequences(part):
        shares = (logits_of(q[asking], wide_k[seen], part, scale) - lse[:, asking, None]).exp()
        d_v[seen] += torch.einsum("hqk,qhd->khd", shares, grad[asking])
        d_shares = torch.einsum("qhd,khd->hqk", grad[asking], wide_v[seen])
        inner = (grad[asking] * out[asking]).sum(-1).T.unsqueeze(-1)
        d_logits = shares * (d_shares - inner) * scale
        d_q[asking] += torch.einsum("hqk,khd->qhd", d_logits, wide_k[seen])
        d_k[seen] += torch.einsum("hqk,qhd->khd", d_logits, q[asking])
    return d_q, *(x.unflatten(1, (heads, groups)).sum(2) for x in (d_k, d_v))


def played_kernel(func, args, kwargs):
    """The result of aten::_flash_attention_forward or _backward on host tensors."""
    from ptp_ds.attention.flash import Part

    backward = "backward" in func.overloadpacket.__name__
    tensors, (cu_q, cu_k, max_q, max_k, _, causal) = args[: 6 if backward else 3], args[6 if backward else 3 :][:6]
    part = Part(None, None, cu_q, cu_k, max_q, max_k, causal)
    if backward:
        return play_backward(*tensors, part, kwargs["scale"])
    out, lse = play_forward(*tensors, part, kwargs["scale"])
    return out, lse, *torch.zeros(3, 0)
