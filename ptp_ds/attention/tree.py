"""Attention over the packed row's tree: the prefix attends to itself, every block to the prefix and to itself.

On a CPU rows take two parts, to the prefix and to themselves, merged by log-sum-exp (MergedAttention), or, in bf16,
whole matrices (ptp_ds.attention.dense); on a GPU in half precision segments are merged (ptp_ds.attention.flash).

The reference serves everything else: soft caps, sinks, short windows, the prefix itself, scored positions alone. It
gathers blocks into a few buckets of similar length, so that the only padding is inside the attention product, and each
bucket is one call of torch's scaled_dot_product_attention with an additive mask. Query heads that share a key head are
folded into the query length, so grouped-query keys are never repeated. Soft caps and sinks have no such call, only
whole matrices; these are computed again in backward (RecomputedAttention).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptp_ds.attention.backends import without_cudnn
from ptp_ds.attention.dense import dense_attend, dense_serves
from ptp_ds.attention.flash import flash_attend, flash_serves
from ptp_ds.attention.plan import ForestPlan, Piece, Plan, Slots, TreePlan
from ptp_ds.precision import at_least_fp32

KeysValues = tuple[Tensor, Tensor]


class _Pad(torch.autograd.Function):
    """[T, D] block tokens to [sum R*length, D] bucket slots; padding repeats a token and sends no gradient back.

    A plain index_select would scatter-add in its backward, row by row; here both directions are gathers.
    """

    @staticmethod
    def forward(ctx, x, to_padded, to_packed):  # type: ignore[override]
        ctx.save_for_backward(to_packed)
        return x.index_select(0, to_padded)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """The way back: [sum R*length, D] to [T, D]; padding slots get a zero gradient, so padding moves no key."""

    @staticmethod
    def forward(ctx, x, to_packed):  # type: ignore[override]
        ctx.save_for_backward(to_packed)
        ctx.slots = x.shape[0]
        return x.index_select(0, to_packed)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        return grad.new_zeros(ctx.slots, grad.shape[1]).index_copy_(0, ctx.saved_tensors[0], grad), None


def merged_serves(plan: TreePlan, q_THD: Tensor, v_TKD: Tensor) -> bool:
    """Whether MergedAttention serves this call: on a CPU, all tokens asking, behind a prefix, widths alike."""
    return q_THD.device.type == "cpu" and plan.rows_behind_a_prefix and v_TKD.shape[-1] == q_THD.shape[-1]


class MergedAttention(torch.autograd.Function):
    """Rows' attention in two parts, to the prefix and to themselves, joined by their log-sum-exps.

    The prefix's keys and values lie there once for all rows; no row joins or pads keys. Each part's backward is that of
    ordinary attention with the joined output and log-sum-exp: its probabilities are then the joint ones
    (FlashAttention, Dao et al. 2022, section 3.1). The prefix's keys and values get gradients summed over all rows.
    """

    @staticmethod
    def forward(ctx, q, k, v, k_prefix, v_prefix, plan, scale):  # type: ignore[override]
        groups = q.shape[1] // k.shape[1]
        q = _spread(q, 1)
        k, v, k_prefix, v_prefix = (_spread(x, groups) for x in (k, v, k_prefix, v_prefix))
        out_prefix, lse_prefix = _flash(q, k_prefix, v_prefix, 0.0, False, scale=scale)
        outs, lses = [], []
        for piece, part in _by_piece(plan, q, k, v):
            mask = _mask_of(plan, piece, q)
            out_b, lse_b = _flash(*part, 0.0, mask is None and piece.causal, attn_mask=mask, scale=scale)
            outs.append(out_b)
            lses.append(lse_b)
        own, out = torch.cat(lses, dim=2), out_prefix
        share = torch.sigmoid(own - lse_prefix).unsqueeze(-1).to(out.dtype)
        torch._foreach_lerp_(_split(plan, out), outs, _split(plan, share))
        lse = torch.logaddexp(own, lse_prefix)
        for asking, seen in plan.pieces()[1]:
            part_out, part_lse = _flash(q[:, :, asking], k[:, :, seen], v[:, :, seen], 0.0, False, scale=scale)
            share = torch.sigmoid(part_lse - lse[:, :, asking]).unsqueeze(-1).to(out.dtype)
            out[:, :, asking].lerp_(part_out, share)
            lse[:, :, asking] = torch.logaddexp(lse[:, :, asking], part_lse)
        ctx.save_for_backward(q, k, v, k_prefix, v_prefix, out, lse)
        ctx.plan, ctx.scale, ctx.groups = plan, scale, groups
        return out[0].transpose(0, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, k_prefix, v_prefix, out, lse = ctx.saved_tensors
        grad, scale = _spread(grad, 1), ctx.scale
        d_q, d_k_prefix, d_v_prefix = _flash_backward(grad, q, k_prefix, v_prefix, out, lse, 0.0, False, scale=scale)
        to_prefix = [_gathered(x, ctx.groups) for x in (d_k_prefix, d_v_prefix)]
        if not any(ctx.needs_input_grad[:3]):  # the first layer's clean rows move nothing
            return None, None, None, *to_prefix, None, None
        parts = []
        for piece, part in _by_piece(ctx.plan, grad, q, k, v, out, lse):
            mask = _mask_of(ctx.plan, piece, q)
            causal = mask is None and piece.causal
            parts.append(_flash_backward(*part, 0.0, causal, attn_mask=mask, scale=scale))
        own_q, *columns = zip(*parts, strict=True)
        torch._foreach_add_(_split(ctx.plan, d_q), own_q)
        d_k, d_v = (_joined(column) for column in columns)
        for asking, seen in ctx.plan.pieces()[1]:
            asked = (x[:, :, asking] for x in (grad, q))
            found = _flash_backward(
                *asked, k[:, :, seen], v[:, :, seen], out[:, :, asking], lse[:, :, asking], 0.0, False, scale=scale
            )
            for sums, place, more in zip((d_q, d_k, d_v), (asking, seen, seen), found, strict=True):
                sums[:, :, place] += more
        own = (_gathered(x, ctx.groups) for x in (d_k, d_v))
        return _gathered(d_q, 1), *own, *to_prefix, None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _spread(x_THD: Tensor, groups: int) -> Tensor:
    """[T, heads, d] -> [1, heads * groups, T, d], each head `groups` times."""
    x = x_THD if groups == 1 else x_THD.repeat_interleave(groups, dim=1)
    return x.transpose(0, 1).unsqueeze(0)


def _gathered(x: Tensor, groups: int) -> Tensor:
    """The transpose of _spread: [1, heads * groups, T, d] -> [T, heads, d], summed over a head's copies."""
    x_THD = x[0].transpose(0, 1)
    return x_THD if groups == 1 else x_THD.unflatten(1, (-1, groups)).sum(2)


def _by_piece(plan: TreePlan, *tensors: Tensor) -> Iterator[tuple[Piece, tuple[Tensor, ...]]]:
    """Each tensor's part [1, heads, length, ...] for one piece of the row after the other."""
    return zip(plan.pieces()[0], zip(*(_split(plan, x) for x in tensors), strict=True), strict=True)


def _split(plan: TreePlan, x: Tensor) -> tuple[Tensor, ...]:
    return x.split([piece.length for piece in plan.pieces()[0]], dim=2)


def _mask_of(plan: TreePlan, piece: Piece, q: Tensor) -> Tensor | None:
    return None if piece.masked is None else plan.block_mask(piece.masked, q.dtype)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """[1, heads, length, d] parts -> [1, heads, T, d], laid out token by token as the flash kernels do."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


class RecomputedAttention(torch.autograd.Function):
    """attend_tree_reference, of which nothing is kept but what it was given: backward computes it again.

    Its matrices of probabilities would grow with the square of a row, beyond what the check's short rows tell of a
    token's cost. sinks: None where there are none; how: attend_tree_reference's further keywords.
    """

    @staticmethod
    def forward(ctx, q, k, v, k_prefix, v_prefix, sinks, plan, how):  # type: ignore[override]
        ctx.save_for_backward(q, k, v, k_prefix, v_prefix, sinks)
        ctx.plan, ctx.how = plan, how
        return _reference(q, k, v, k_prefix, v_prefix, sinks, plan, how)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        given = [
            None if tensor is None else tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        with torch.enable_grad():
            out = _reference(*given, ctx.plan, ctx.how)
        wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad))
        grads = [next(found) if tensor is not None and tensor.requires_grad else None for tensor in given]
        return *grads, None, None


def _reference(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor | None, v_prefix: Tensor | None, sinks: Tensor | None,
    plan: TreePlan, how: dict[str, Any],
) -> Tensor:  # fmt: skip
    prefix = (k_prefix, v_prefix) if k_prefix is not None and v_prefix is not None else None
    return attend_tree_reference(q, k, v, plan, prefix, sinks=sinks, **how)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """softmax(softcap(q k^T scale) + mask) v; q [R, heads, Q, d], k and v [R, heads, K, d], mask over [Q, K].

    sinks: [heads * g], the logit of a key more that has no value, for each query head; Q is then g * queries.
    """
    if softcap is None and sinks is None:
        with without_cudnn():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = q @ k.transpose(-1, -2) * (scale if softcap is None else scale / softcap)
    if softcap is not None:
        logits = torch.tanh(logits) * softcap
    logits = at_least_fp32(logits + mask)
    if sinks is None:
        return torch.softmax(logits, dim=-1).to(v.dtype) @ v
    of_heads = sinks.to(logits).view(q.shape[1], -1, 1).expand(-1, -1, q.shape[2] * q.shape[1] // sinks.numel())
    column = of_heads.reshape(1, q.shape[1], -1, 1).expand(q.shape[0], -1, -1, -1)
    return torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1].to(v.dtype) @ v


def _fold(x: Tensor, heads: int) -> Tensor:
    """[R, Q, heads * g, d] -> [R, heads, g * Q, d]: query heads of one key head lie behind each other."""
    rows, length, all_heads, width = x.shape
    return x.view(rows, length, heads, all_heads // heads, width).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, width)


def _unfold(x: Tensor, length: int, all_heads: int) -> Tensor:
    """The inverse of _fold, with rows and length joined: [R * Q, heads * g, d]."""
    rows, heads, _, width = x.shape
    split = x.view(rows, heads, all_heads // heads, length, width).permute(0, 3, 1, 2, 4)
    return split.reshape(rows * length, all_heads, width)


def attend_forest(
    attend: Callable[..., Tensor], q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: ForestPlan, prefix: KeysValues,
    **how: Any,
) -> Tensor:  # fmt: skip
    """`attend` where runs of blocks stand on several prefixes, one tree after the other. prefix: all prefixes'."""
    queries = q_THD.split([tree.query_slots.to_packed.shape[0] for tree in plan.trees])
    tokens = [tree.key_slots.to_packed.shape[0] for tree in plan.trees]
    # split, not slices: the backward of a slice fills a whole tensor with zeros, that of a split is one cat.
    own = zip(k_TKD.split(tokens), v_TKD.split(tokens), strict=True)
    behind = list(zip(*(x.split(plan.lengths) for x in prefix), strict=True))
    outs = [
        attend(q, k, v, tree, behind[number], **how)
        for q, (k, v), tree, number in zip(queries, own, plan.trees, plan.prefixes, strict=True)
    ]
    return torch.cat(outs)


def attend_tree(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: Plan, prefix: KeysValues | None = None, *,
    scale: float, softcap: float | None = None, window: int | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one layer over the packed row: [P + T, heads, d] -> [P + T, heads, d].

    q has heads * g query heads, k and v heads key heads. With `prefix` (cached keys and values [P, heads, d]) the row
    holds blocks only. window: keys at a distance of `window` positions or more are not seen.
    sinks: [heads * g] logits of a key without a value, one for each query head (gpt_oss).
    """
    window = None if window is not None and window >= plan.longest_path else window
    simple = softcap is None and window is None and sinks is None
    if isinstance(plan, ForestPlan):
        assert prefix is not None
        if simple and flash_serves(plan, q_THD, v_TKD):
            return flash_attend(q_THD, k_TKD, v_TKD, plan, prefix, scale)
        how = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
        return attend_forest(attend_tree, q_THD, k_TKD, v_TKD, plan, prefix, **how)
    if simple and dense_serves(plan, q_THD, prefix is not None):
        return dense_attend(q_THD, k_TKD, v_TKD, plan, prefix, scale)
    if prefix is not None and simple:
        if merged_serves(plan, q_THD, v_TKD):
            return MergedAttention.apply(q_THD, k_TKD, v_TKD, *prefix, plan, scale)
        if flash_serves(plan, q_THD, v_TKD):
            return flash_attend(q_THD, k_TKD, v_TKD, plan, prefix, scale)
    if simple and alone_serves(plan, q_THD):
        return attend_alone(q_THD, k_TKD, v_TKD, plan, scale)
    if softcap is None and sinks is None:
        return attend_tree_reference(q_THD, k_TKD, v_TKD, plan, prefix, scale=scale, window=window)
    how = {"scale": scale, "softcap": softcap, "window": window}
    return RecomputedAttention.apply(q_THD, k_TKD, v_TKD, *(prefix or (None, None)), sinks, plan, how)


def alone_serves(plan: TreePlan, q_THD: Tensor) -> bool:
    """Whether attend_alone serves this call: on a CPU, no prefix, every token asking, blocks of one segment."""
    alone = plan.every_token_asks and not plan.prefix_keys and all(len(block.starts) == 1 for block in plan.blocks)
    return alone and bool(plan.blocks) and q_THD.device.type == "cpu"


def attend_alone(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: TreePlan, scale: float) -> Tensor:
    """Blocks that see nothing but themselves (an encoder's), one after the other: nothing is padded or masked."""
    groups = q_THD.shape[1] // k_TKD.shape[1]
    q, k, v = _spread(q_THD, 1), _spread(k_TKD, groups), _spread(v_TKD, groups)
    parts = _by_piece(plan, q, k, v)
    outs = [
        F.scaled_dot_product_attention(q_b, k_b, v_b, is_causal=piece.causal, scale=scale)
        for piece, (q_b, k_b, v_b) in parts
    ]
    return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)


def attend_tree_reference(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: TreePlan, prefix: KeysValues | None = None, *,
    scale: float, softcap: float | None = None, window: int | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """attend_tree by buckets and masks, keys of the prefix and of the row joined: for every feature and device."""
    heads, all_heads, length = k_TKD.shape[1], q_THD.shape[1], plan.prefix_length
    groups = all_heads // heads
    # split, not slices: the backward of a slice fills a whole tensor with zeros, that of a split is one cat.
    (q_prefix, q_rows), (k_own, k_rows), (v_own, v_rows) = (
        x.split([length, x.shape[0] - length]) for x in (q_THD, k_TKD, v_TKD)
    )
    k_prefix, v_prefix = prefix if prefix is not None else (k_own, v_own)
    k_prefix, v_prefix = k_prefix.transpose(0, 1)[None], v_prefix.transpose(0, 1)[None]
    parts = []
    if length:
        mask = plan.mask(-1, q_THD.dtype, groups, window)
        out = _attend(_fold(q_prefix[None], heads), k_prefix, v_prefix, mask, scale, softcap, sinks)
        parts.append(_unfold(out, length, all_heads))
    if not plan.buckets:
        return parts[0]
    q = _padded(q_rows, plan.query_slots, [bucket.rows * bucket.queries for bucket in plan.buckets])
    key_sizes = [bucket.rows * bucket.keys for bucket in plan.buckets]
    k, v = (_padded(x, plan.key_slots, key_sizes) for x in (k_rows, v_rows))
    outs = []
    for number, bucket in enumerate(plan.buckets):
        rows = bucket.rows
        q_b = _fold(q[number].view(rows, bucket.queries, all_heads, -1), heads)
        k_b, v_b = (x[number].view(rows, bucket.keys, heads, -1).transpose(1, 2) for x in (k, v))
        k_b = torch.cat([k_prefix.expand(rows, -1, -1, -1), k_b], dim=2)
        v_b = torch.cat([v_prefix.expand(rows, -1, -1, -1), v_b], dim=2)
        mask = plan.mask(number, q_THD.dtype, groups, window)
        outs.append(_unfold(_attend(q_b, k_b, v_b, mask, scale, softcap, sinks), bucket.queries, all_heads))
    padded = torch.cat(outs)
    packed = _Unpad.apply(padded.view(padded.shape[0], -1), plan.query_slots.to_packed)
    parts.append(packed.view(-1, all_heads, padded.shape[-1]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def attend_reference(q: Tensor, k: Tensor, v: Tensor, plan: Plan, prefix: KeysValues, scale: float) -> Tensor:
    """attend_tree_reference for blocks behind cached prefixes: what other ways are held against."""
    if isinstance(plan, ForestPlan):
        return attend_forest(attend_tree_reference, q, k, v, plan, prefix, scale=scale)
    return attend_tree_reference(q, k, v, plan, prefix, scale=scale)


def _padded(x_THD: Tensor, slots: Slots, sizes: list[int]) -> tuple[Tensor, ...]:
    """[T, heads, d] -> for each bucket [rows * length, heads * d]."""
    return _Pad.apply(x_THD.reshape(x_THD.shape[0], -1), slots.to_padded, slots.to_packed).split(sizes)
