"""Rows' attention on a CPU in half precision: whole matrices of probabilities, a bucket of like lengths at a time.

torch's flash kernels for CPUs take bf16 in small pieces, a backward 20 times the time of its products. For rows of a
few hundred tokens plain products, one softmax and gathers do the same. Prefix and row lie in one matrix, so that a
row's probabilities are joint by themselves; the query heads of a key head lie behind each other, so that no key is
repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ptp_ds.attention.plan import TreePlan
from ptp_ds.precision import at_least_fp32

_DTYPES = (torch.bfloat16,)
_LONGEST = 768  # keys: beyond it probabilities, kept for backward, are more than a layer keeps without them
_LINE = 32  # keys are filled up to a multiple: what a vector of bf16 holds, for softmax and products


@dataclass(frozen=True)
class _Places:
    """One bucket of R rows with L queries and W keys (prefix, own, filled up) for G query heads at each of K key heads.

    queries [R * K * G * L], keys [R * K * W]: rows of [T * heads, d] and of the prefix's and the row's keys together.
    padding: query slots without a token. mask [1 or R, G * L, W]: 0, or the least number.
    """

    rows: int
    width: int
    queries: Tensor
    keys: Tensor
    padding: Tensor
    mask: Tensor


@dataclass(frozen=True)
class _Layout:
    """All buckets of a plan for a number of heads.

    of_query [T * heads], of_key [T * key heads]: where each lies in the buckets, one behind the other.
    """

    buckets: list[_Places]
    of_query: Tensor
    of_key: Tensor


def dense_serves(plan: TreePlan, q_THD: Tensor, prefix: bool) -> bool:
    """Whether dense_attend serves this call: bf16 on a CPU, all tokens asking, rows short enough, keys at hand."""
    known = q_THD.device.type == "cpu" and q_THD.dtype in _DTYPES and plan.every_token_asks and bool(plan.blocks)
    return known and prefix == (plan.prefix_keys > 0) and plan.longest_path <= _LONGEST


def dense_attend(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: TreePlan, prefix: tuple[Tensor, Tensor] | None, scale: float
) -> Tensor:
    """[T, heads, d] of rows behind `prefix` (keys and values [P, key heads, d]), or alone. See attention.tree."""
    nothing = (k_TKD[:0], v_TKD[:0])
    return _Dense.apply(q_THD, k_TKD, v_TKD, *(prefix if prefix is not None else nothing), plan, scale)


class _Dense(torch.autograd.Function):
    """softmax(q [prefix, k]^T scale + mask) [prefix, v]; keeps the probabilities.

    Logits and softmax are in fp32: as near to exact as torch's own, for 3 % of a step's time.
    """

    @staticmethod
    def forward(ctx, q, k, v, k_prefix, v_prefix, plan, scale):  # type: ignore[override]
        layout = _layout(plan, q.shape[1], k.shape[1])
        flat_q, flat_k, flat_v = _flat(q), _flat(torch.cat([k_prefix, k])), _flat(torch.cat([v_prefix, v]))
        outs, kept = [], []
        for places in layout.buckets:
            queries, keys, values = _bucket(places, flat_q, flat_k, flat_v, k.shape[1])
            wide = at_least_fp32(keys).transpose(1, 2)
            logits = torch.baddbmm(_mask_of(places, queries).to(wide.dtype), at_least_fp32(queries), wide, alpha=scale)
            probabilities = torch.softmax(logits, -1).to(q.dtype)
            outs.append(torch.bmm(probabilities, values).view(-1, v.shape[-1]))
            kept.append(probabilities)
        ctx.save_for_backward(q, k, v, k_prefix, v_prefix, *kept)
        ctx.layout, ctx.scale = layout, scale
        return _gathered(outs, layout.of_query).view(*q.shape[:2], v.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, k_prefix, v_prefix, *kept = ctx.saved_tensors
        flat_q, flat_k, flat_v = _flat(q), _flat(torch.cat([k_prefix, k])), _flat(torch.cat([v_prefix, v]))
        flat_grad, heads, own = _flat(grad), k.shape[1], any(ctx.needs_input_grad[:3])
        d_q, d_k, d_v = [], [], []
        for places, probabilities in zip(ctx.layout.buckets, kept, strict=True):
            queries, keys, values = _bucket(places, flat_q, flat_k, flat_v, heads)
            asked = flat_grad.index_select(0, places.queries).index_fill_(0, places.padding, 0)
            asked = asked.view(*queries.shape[:2], -1)
            of_logits = torch.ops.aten._softmax_backward_data(
                torch.bmm(asked, values.transpose(1, 2)), probabilities, -1, probabilities.dtype
            )
            d_v.append(torch.bmm(probabilities.transpose(1, 2), asked))
            d_k.append(_scaled(of_logits.transpose(1, 2), queries, ctx.scale))
            if own:
                d_q.append(_scaled(of_logits, keys, ctx.scale).view(-1, q.shape[-1]))
        to_prefix = [_to_prefix(x, ctx.layout, k_prefix) for x in (d_k, d_v)]
        if not own:  # the first layer's clean rows move nothing
            return None, None, None, *to_prefix, None, None
        to_q = _gathered(d_q, ctx.layout.of_query).view(q.shape)
        to_own = [_gathered([part.view(-1, x.shape[-1]) for part in parts], ctx.layout.of_key).view(x.shape)
                  for parts, x in ((d_k, k), (d_v, v))]  # fmt: skip
        return to_q, *to_own, *to_prefix, None, None


def _flat(x_THD: Tensor) -> Tensor:
    return x_THD.reshape(-1, x_THD.shape[-1])


def _gathered(parts: Sequence[Tensor], places: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).index_select(0, places)


def _bucket(places: _Places, q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A bucket's queries [R * K, G * L, d], keys and values [R * K, W, d]."""
    batch = places.rows * heads
    return (
        q.index_select(0, places.queries).view(batch, -1, q.shape[-1]),
        k.index_select(0, places.keys).view(batch, places.width, -1),
        v.index_select(0, places.keys).view(batch, places.width, -1),
    )


def _mask_of(places: _Places, queries: Tensor) -> Tensor:
    """[R * K, G * L, W] for the bucket's queries; a view of one row's where rows are masked alike."""
    mask, heads = places.mask, queries.shape[0] // places.rows
    return mask.expand(queries.shape[0], -1, -1) if mask.shape[0] == 1 else mask.repeat_interleave(heads, dim=0)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """a b * scale, batch by batch, rounded once."""
    return torch.baddbmm(a.new_empty(()).expand(*a.shape[:2], b.shape[2]), a, b, beta=0, alpha=scale)


def _to_prefix(parts: Sequence[Tensor], layout: _Layout, like: Tensor) -> Tensor:
    """[P, K, d]: what the buckets' keys or values [R * K, W, d] send to the prefix, summed over rows in fp32."""
    sums = at_least_fp32(like.new_zeros(like.shape[1], like.shape[0], like.shape[2]))
    for places, part in zip(layout.buckets, parts, strict=True):
        shaped = part.view(places.rows, -1, places.width, part.shape[-1])
        sums += shaped[:, :, : like.shape[0]].sum(0, dtype=sums.dtype)
    return sums.transpose(0, 1).to(like.dtype)


def _layout(plan: TreePlan, heads: int, key_heads: int) -> _Layout:
    """The plan's, made at first use."""
    if (heads, key_heads) not in plan.layouts:
        plan.layouts[heads, key_heads] = _make_layout(plan, heads, key_heads)
    return plan.layouts[heads, key_heads]


def _make_layout(plan: TreePlan, heads: int, key_heads: int) -> _Layout:
    prefix, groups = plan.prefix_keys, heads // key_heads
    to_padded, to_packed = (x.numpy() for x in (plan.key_slots.to_padded, plan.key_slots.to_packed))
    tokens = to_packed.shape[0]
    of_query, of_key = np.empty((tokens, heads), dtype=np.int64), np.empty((tokens, key_heads), dtype=np.int64)
    buckets, slot, query_start, key_start = [], 0, 0, 0
    for bucket in plan.buckets:
        rows, length = bucket.rows, bucket.keys
        width = -(-(prefix + length) // _LINE) * _LINE
        own = to_padded[slot : slot + rows * length].reshape(rows, length)
        real = to_packed[own] == slot + np.arange(rows * length).reshape(rows, length)
        head = np.arange(heads).reshape(1, key_heads, groups, 1)
        queries = own[:, None, None, :] * heads + head
        keys = np.zeros((rows, key_heads, width), dtype=np.int64)
        keys[:, :, :prefix] = (np.arange(prefix) * key_heads)[None, None] + np.arange(key_heads)[None, :, None]
        keys[:, :, prefix : prefix + length] = (own[:, None] + prefix) * key_heads + np.arange(key_heads)[None, :, None]
        visible = np.zeros((bucket.visible.shape[0], length, width), dtype=bool)
        visible[:, :, :prefix] = True
        visible[:, :, prefix : prefix + length] = bucket.visible.numpy()
        mask = torch.zeros(visible.shape, dtype=torch.float32)
        mask.masked_fill_(torch.from_numpy(~visible), torch.finfo(mask.dtype).min)
        query_slots = query_start + np.arange(queries.size).reshape(queries.shape)
        padding = np.broadcast_to(~real[:, None, None, :], queries.shape)
        key_slots = key_start + np.arange(keys.size).reshape(keys.shape)[:, :, prefix : prefix + length]
        of_query[own[real]] = query_slots.transpose(0, 3, 1, 2).reshape(rows, length, heads)[real]
        of_key[own[real]] = key_slots.transpose(0, 2, 1)[real]
        asked, seen, empty = (torch.from_numpy(x.reshape(-1)) for x in (queries, keys, np.flatnonzero(padding)))
        buckets.append(_Places(rows, width, asked, seen, empty, mask.repeat(1, groups, 1)))
        slot, query_start, key_start = slot + rows * length, query_start + queries.size, key_start + keys.size
    return _Layout(buckets, torch.from_numpy(of_query.reshape(-1)), torch.from_numpy(of_key.reshape(-1)))
