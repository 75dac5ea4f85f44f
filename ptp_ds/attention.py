"""Attention over the packed row's tree, behind transformers' AttentionInterface.

The trunk (soft prompt) attends to itself; every block attends to the trunk and to itself along its tree. Blocks
are gathered into a few buckets of similar length, so that the only padding is inside the attention product, and
each bucket is one call of torch's scaled_dot_product_attention with an additive mask. Query heads that share a
key head are folded into the query length, so grouped-query keys are never repeated.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ptp_ds.packing import Block

ATTENTION_NAME = "ptp_tree"
# Keywords that families hand to their attention function and that change nothing here: dropout is checked to be 0,
# positions are already in the rotated keys, the rest are outputs or hints for other kernels.
_INERT_KEYWORDS = frozenset(
    {"output_attentions", "output_hidden_states", "use_cache", "return_dict", "is_causal", "position_ids",
     "cache_position", "logits_to_keep", "num_items_in_batch"}
)  # fmt: skip
_SHRINK = 0.7  # a bucket holds blocks down to this share of its longest: more buckets mean less padding, more calls

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


@dataclass
class _Bucket:
    """Blocks padded to one length. visible: [1 or R, length, length] bool; depth: [1 or R, length] positions."""

    rows: int
    length: int
    visible: np.ndarray
    depth: np.ndarray


@dataclass
class TreePlan:
    """How one packed row attends: built once a row on the host, used by every layer.

    trunk_length: P tokens at the row's front, 0 where the trunk's keys come from a cache. trunk_keys: P in either
    case. to_padded [sum R*length], to_packed [T]: block tokens to bucket slots and back.
    """

    trunk_length: int
    trunk_keys: int
    buckets: list[_Bucket]
    to_padded: Tensor
    to_packed: Tensor
    device: torch.device
    _masks: dict = field(default_factory=dict)

    def mask(self, bucket: int, dtype: torch.dtype, groups: int, window: int | None) -> Tensor:
        """[1 or R, 1, groups * length, P + length] additive mask of a bucket, made once per plan; -1 is the trunk."""
        key = (bucket, dtype, groups, window)
        if key not in self._masks:
            self._masks[key] = self._make_mask(bucket, dtype, groups, window)
        return self._masks[key]

    def _make_mask(self, bucket: int, dtype: torch.dtype, groups: int, window: int | None) -> Tensor:
        trunk = np.arange(self.trunk_keys)
        if bucket < 0:
            visible, keys, queries = np.tri(self.trunk_keys, dtype=bool)[None], trunk[None], trunk[None]
        else:
            shape = self.buckets[bucket]
            rows = shape.visible.shape[0]
            to_trunk = np.ones((rows, shape.length, self.trunk_keys), dtype=bool)
            visible = np.concatenate([to_trunk, shape.visible], axis=2)
            queries = shape.depth + self.trunk_keys
            keys = np.concatenate([np.broadcast_to(trunk, (rows, self.trunk_keys)), queries], axis=1)
        if window is not None:
            visible = visible & (queries[:, :, None] - keys[:, None, :] < window)
        additive = torch.zeros(visible.shape, dtype=dtype)
        additive.masked_fill_(torch.from_numpy(~visible), torch.finfo(dtype).min)
        return additive.repeat(1, groups, 1)[:, None].to(self.device)


def _bucket_bounds(lengths: Sequence[int]) -> list[list[int]]:
    """Block numbers, longest first, cut where a block is shorter than _SHRINK of its bucket's longest."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    bounds: list[list[int]] = []
    for number in order:
        if not bounds or lengths[number] < _SHRINK * lengths[bounds[-1][0]]:
            bounds.append([])
        bounds[-1].append(number)
    return bounds


def _make_bucket(members: Sequence[Block]) -> _Bucket:
    longest = max(block.length for block in members)
    if all(len(block.starts) == 1 for block in members):  # causal inside: padding lies behind every real query
        return _Bucket(len(members), longest, np.tri(longest, dtype=bool)[None], np.arange(longest)[None])
    visible = np.zeros((len(members), longest, longest), dtype=bool)
    depth = np.zeros((len(members), longest), dtype=np.int64)
    for row, block in enumerate(members):
        visible[row, : block.length, : block.length] = block.visible()
        visible[row, block.length :, 0] = True  # a padding query must see something, or softmax gives NaN
        depth[row, : block.length] = block.depths()
    return _Bucket(len(members), longest, visible, depth)


def plan_tree(blocks: Sequence[Block], trunk_length: int, trunk_keys: int, device: torch.device | str) -> TreePlan:
    """The plan for `blocks` behind a trunk; see TreePlan. Blocks may be empty (the trunk alone)."""
    lengths = [block.length for block in blocks]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    buckets, to_padded = [], []
    to_packed = np.empty(int(starts[-1]), dtype=np.int64)
    slot = 0
    for members in _bucket_bounds(lengths):
        bucket = _make_bucket([blocks[number] for number in members])
        buckets.append(bucket)
        for number in members:
            length, start = lengths[number], starts[number]
            padded = np.full(bucket.length, start, dtype=np.int64)
            padded[:length] = start + np.arange(length)
            to_padded.append(padded)
            to_packed[start : start + length] = slot + np.arange(length)
            slot += bucket.length
    index = np.concatenate(to_padded) if to_padded else np.empty(0, dtype=np.int64)
    device = torch.device(device)
    return TreePlan(
        trunk_length, trunk_keys, buckets,
        torch.from_numpy(index).to(device), torch.from_numpy(to_packed).to(device), device,
    )  # fmt: skip


@dataclass
class _Pass:
    """State of one forward: the plan, where trunk keys come from, and whether to record them."""

    plan: TreePlan
    trunk: dict[nn.Module, KeysValues] | None
    record: dict[nn.Module, KeysValues] | None
    calls: int = 0
    windows: set[int | None] = field(default_factory=set)
    local_sizes: set[int] = field(default_factory=set)


_current: ContextVar[_Pass | None] = ContextVar("ptp_tree_pass", default=None)


@contextmanager
def tree_pass(
    plan: TreePlan,
    trunk: dict[nn.Module, KeysValues] | None = None,
    record: dict[nn.Module, KeysValues] | None = None,
) -> Iterator[_Pass]:
    """Every attention call inside follows `plan`. trunk: cached keys and values per attention module, [P, heads, d].

    record: filled with the trunk's keys and values of this pass, with their graph. Yields the pass, which counts calls.
    """
    state = _Pass(plan, trunk, record)
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """softmax(softcap(q k^T scale) + mask) v; q [R, heads, Q, d], k and v [R, heads, K, d], mask over [Q, K]."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    return torch.softmax((logits + mask).float(), dim=-1).to(v.dtype) @ v


def _fold(x: Tensor, heads: int) -> Tensor:
    """[R, Q, heads * g, d] -> [R, heads, g * Q, d]: query heads of one key head lie behind each other."""
    rows, length, all_heads, width = x.shape
    return x.view(rows, length, heads, all_heads // heads, width).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, width)


def _unfold(x: Tensor, length: int, all_heads: int) -> Tensor:
    """The inverse of _fold, with rows and length joined: [R * Q, heads * g, d]."""
    rows, heads, _, width = x.shape
    split = x.view(rows, heads, all_heads // heads, length, width).permute(0, 3, 1, 2, 4)
    return split.reshape(rows * length, all_heads, width)


def attend_tree(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, plan: TreePlan, trunk: KeysValues | None = None, *,
    scale: float, softcap: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention of one layer over the packed row: [P + T, heads, d] -> [P + T, heads, d].

    q has heads * g query heads, k and v heads key heads. With `trunk` (cached keys and values [P, heads, d]) the row
    holds blocks only. window: keys at a distance of `window` positions or more are not seen.
    """
    heads, all_heads, length = k_TKD.shape[1], q_THD.shape[1], plan.trunk_length
    groups = all_heads // heads
    # split, not slices: the backward of a slice fills a whole tensor with zeros, that of a split is one cat.
    (q_trunk, q_rows), (k_own, k_rows), (v_own, v_rows) = (
        x.split([length, x.shape[0] - length]) for x in (q_THD, k_TKD, v_TKD)
    )
    k_trunk, v_trunk = trunk if trunk is not None else (k_own, v_own)
    k_trunk, v_trunk = k_trunk.transpose(0, 1)[None], v_trunk.transpose(0, 1)[None]
    parts = []
    if length:
        mask = plan.mask(-1, q_THD.dtype, groups, window)
        out = _attend(_fold(q_trunk[None], heads), k_trunk, v_trunk, mask, scale, softcap)
        parts.append(_unfold(out, length, all_heads))
    if not plan.buckets:
        return parts[0]
    sizes = [bucket.rows * bucket.length for bucket in plan.buckets]
    q, k, v = (
        _Pad.apply(x.reshape(x.shape[0], -1), plan.to_padded, plan.to_packed).split(sizes)
        for x in (q_rows, k_rows, v_rows)
    )
    outs = []
    for number, bucket in enumerate(plan.buckets):
        rows, size = bucket.rows, bucket.length
        q_b = _fold(q[number].view(rows, size, all_heads, -1), heads)
        k_b, v_b = (x[number].view(rows, size, heads, -1).transpose(1, 2) for x in (k, v))
        k_b = torch.cat([k_trunk.expand(rows, -1, -1, -1), k_b], dim=2)
        v_b = torch.cat([v_trunk.expand(rows, -1, -1, -1), v_b], dim=2)
        mask = plan.mask(number, q_THD.dtype, groups, window)
        outs.append(_unfold(_attend(q_b, k_b, v_b, mask, scale, softcap), size, all_heads))
    padded = torch.cat(outs)
    packed = _Unpad.apply(padded.view(padded.shape[0], -1), plan.to_packed)
    parts.append(packed.view(-1, all_heads, padded.shape[-1]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, **others: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature: q, k, v [1, heads, P + T, d] -> ([1, P + T, heads, d], None)."""
    state = _current.get()
    name = type(module).__name__
    if state is None:
        raise ValueError(f"{name} was called outside a packed pass; score through ptp_ds.backbone, not the bare model.")
    unknown = {word for word, value in others.items() if value is not None and word not in _INERT_KEYWORDS}
    if unknown:
        raise ValueError(f"{name} hands attention {sorted(unknown)}, which packed attention doesn't know: refused.")
    if dropout or attention_mask is not None:
        raise ValueError(f"{name} asks for dropout {dropout} or a mask of its own; a frozen packed row has neither.")
    if query.shape[0] != 1:
        raise ValueError(f"{name} got {query.shape[0]} rows; a packed batch is one row.")
    state.calls += 1
    state.windows.add(sliding_window)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    length = state.plan.trunk_length
    if state.record is not None:
        state.record[module] = (k[:length].clone(), v[:length].clone())  # a view would keep the whole row alive
    trunk = state.trunk[module] if state.trunk is not None else None
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out = attend_tree(q, k, v, state.plan, trunk, scale=scale, softcap=softcap, window=sliding_window)
    return out[None], None


def _no_mask(*_: object, local_size: int | None = None, **__: object) -> None:
    """The mask hook: the tree needs no mask; a local window that a family asks for is noted for the start-up check."""
    state = _current.get()
    if state is not None and local_size is not None:
        state.local_sizes.add(int(local_size))


AttentionInterface.register(ATTENTION_NAME, _tree_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
