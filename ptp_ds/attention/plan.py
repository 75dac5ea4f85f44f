"""How a packed row attends: buckets of blocks of similar length, their masks, and where each token lies in them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptp_ds.packing.row import Block

WORTH_A_CALL = 6000  # hidden entries of a mask that cost as much as one more attention call (fp32, 2 cores)
_SHRINK = 0.7  # a bucket holds blocks down to this share of its longest: more buckets mean less padding, more calls


@dataclass
class _Bucket:
    """R blocks padded to K keys and Q queries a block.

    visible [1 or R, Q, K] bool; query_depth [1 or R, Q] and key_depth [1 or R, K]: positions behind the prefix.
    """

    rows: int
    queries: int
    keys: int
    visible: np.ndarray
    query_depth: np.ndarray
    key_depth: np.ndarray


@dataclass(frozen=True)
class Slots:
    """Where tokens lie in the buckets: to_padded [sum R*length]: token of a slot, to_packed [T]: slot of a token."""

    to_padded: Tensor
    to_packed: Tensor


@dataclass(frozen=True)
class Piece:
    """Tokens that attend to themselves: causally, all to all, or by the mask of a block."""

    length: int
    masked: int | None
    causal: bool = True


def _inner_slices(block: Block) -> list[tuple[slice, slice]]:
    """(queries below a segment, the segment) of each segment that has any: depth first, they follow it directly."""
    ends = (*block.starts[1:], block.length)
    last = list(ends)  # where each segment's descendants end
    for segment in range(len(ends) - 1, -1, -1):
        parent = block.parents[segment]
        if parent >= 0:
            last[parent] = max(last[parent], last[segment])
    return [
        (slice(end, stop), slice(start, end))
        for start, end, stop in zip(block.starts, ends, last, strict=True)
        if stop > end
    ]


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


@dataclass
class TreePlan:
    """How one packed row attends: built once a row on the host, used by every layer.

    prefix_length: P tokens at the row's front, 0 where the prefix's keys come from a cache. prefix_keys: P in either
    case. key_slots, query_slots: the same where every token asks; the last layer asks at scored positions only.
    """

    prefix_length: int
    prefix_keys: int
    buckets: list[_Bucket]
    key_slots: Slots
    query_slots: Slots
    device: torch.device
    blocks: tuple[Block, ...] = ()
    parts: list[Any] | None = None  # ptp_ds.attention.flash's, made at first use
    layouts: dict[tuple[int, int], Any] = field(default_factory=dict)  # ptp_ds.attention.dense's, by heads
    _cover: list[Piece] | None = None
    _inner: list[tuple[slice, slice]] = field(default_factory=list)
    _masks: dict = field(default_factory=dict)

    @property
    def every_token_asks(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.query_slots is self.key_slots

    @property
    def rows_behind_a_prefix(self) -> bool:
        """Whether there is a prefix, rows behind it, and all of their tokens ask: what the merging functions serve."""
        return self.every_token_asks and self.prefix_keys > 0 and bool(self.blocks)

    @property
    def longest_path(self) -> int:
        """Tokens of the longest path through prefix and block, at most."""
        return self.prefix_keys + max((block.length for block in self.blocks), default=0)

    def pieces(self) -> tuple[list[Piece], list[tuple[slice, slice]]]:
        """The row cut into pieces that attend to themselves, in order, and (queries, keys) slices behind them.

        A piece is a block, with a mask where it branches; or, where the mask would hide much, a segment of it: then
        everything below a segment also sees all of that segment.
        """
        if self._cover is None:
            self._cover, start = [], 0
            for number, block in enumerate(self.blocks):
                inner = _inner_slices(block)
                lengths = np.diff((*block.starts, block.length))
                seen = sum(int(length) ** 2 // 2 for length in lengths)
                seen += sum((q.stop - q.start) * (k.stop - k.start) for q, k in inner)
                calls = len(lengths) + len(inner) - 1
                if len(lengths) > 1 and block.length**2 - seen > WORTH_A_CALL * calls:
                    self._cover += [Piece(int(length), None) for length in lengths]
                    self._inner += [(_moved(q, start), _moved(k, start)) for q, k in inner]
                else:
                    self._cover.append(Piece(block.length, number if len(lengths) > 1 else None, block.causal))
                start += block.length
        return self._cover, self._inner

    def block_mask(self, number: int, dtype: torch.dtype) -> Tensor | None:
        """[1, 1, length, length] additive mask of one block among its own tokens; None where it is plainly causal."""
        block = self.blocks[number]
        if len(block.starts) == 1:
            return None
        key = ("block", number, dtype)
        if key not in self._masks:
            hidden = torch.from_numpy(~block.visible())
            additive = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self._masks[key] = additive[None, None].to(self.device)
        return self._masks[key]

    def mask(self, bucket: int, dtype: torch.dtype, groups: int, window: int | None) -> Tensor:
        """[1 or R, 1, groups * Q, P + K] additive mask of a bucket, made once per plan; -1 is the prefix."""
        key = (bucket, dtype, groups, window)
        if key not in self._masks:
            self._masks[key] = self._make_mask(bucket, dtype, groups, window)
        return self._masks[key]

    def _make_mask(self, bucket: int, dtype: torch.dtype, groups: int, window: int | None) -> Tensor:
        prefix = np.arange(self.prefix_keys)
        if bucket < 0:
            visible, keys, queries = np.tri(self.prefix_keys, dtype=bool)[None], prefix[None], prefix[None]
        else:
            shape = self.buckets[bucket]
            to_prefix = np.ones((*shape.visible.shape[:2], self.prefix_keys), dtype=bool)
            visible = np.concatenate([to_prefix, shape.visible], axis=2)
            queries = shape.query_depth + self.prefix_keys
            own = shape.key_depth + self.prefix_keys
            keys = np.concatenate([np.broadcast_to(prefix, (own.shape[0], self.prefix_keys)), own], axis=1)
        if window is not None:
            visible = visible & (np.abs(queries[:, :, None] - keys[:, None, :]) < window)
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
    if all(
        len(block.starts) == 1 and block.causal for block in members
    ):  # causal inside: padding lies behind every real query
        depth = np.arange(longest)[None]
        return _Bucket(len(members), longest, longest, np.tri(longest, dtype=bool)[None], depth, depth)
    visible = np.zeros((len(members), longest, longest), dtype=bool)
    depth = np.zeros((len(members), longest), dtype=np.int64)
    for row, block in enumerate(members):
        visible[row, : block.length, : block.length] = block.visible()
        visible[row, block.length :, 0] = True  # a padding query must see something, or softmax gives NaN
        depth[row, : block.length] = block.depths()
    return _Bucket(len(members), longest, longest, visible, depth, depth)


def _ask_only(bucket: _Bucket, asked: Sequence[np.ndarray]) -> _Bucket:
    """The bucket with queries at some tokens of each member only; a short list is padded with its first token."""
    most = max(len(places) for places in asked)
    places_RQ = np.stack([np.concatenate([p, np.repeat(p[:1], most - len(p))]) for p in asked])
    visible = np.broadcast_to(bucket.visible, (bucket.rows, *bucket.visible.shape[1:]))
    depth = np.broadcast_to(bucket.query_depth, (bucket.rows, bucket.query_depth.shape[1]))
    taken = np.take_along_axis(visible, places_RQ[:, :, None], axis=1)
    return _Bucket(
        bucket.rows, most, bucket.keys, taken, np.take_along_axis(depth, places_RQ, axis=1), bucket.key_depth
    )


def _slots(members: Sequence[tuple[np.ndarray, int]], count: int, device: torch.device) -> Slots:
    """members: (token numbers, bucket length) of each bucket row in order; padding repeats the row's first token."""
    padded, to_packed, slot = [], np.empty(count, dtype=np.int64), 0
    for tokens, length in members:
        padded.append(np.concatenate([tokens, np.repeat(tokens[:1], length - len(tokens))]))
        to_packed[tokens] = slot + np.arange(len(tokens))
        slot += length
    to_padded = np.concatenate(padded) if padded else np.empty(0, dtype=np.int64)
    return Slots(torch.from_numpy(to_padded).to(device), torch.from_numpy(to_packed).to(device))


def plan_tree(
    blocks: Sequence[Block], prefix_length: int, prefix_keys: int, device: torch.device | str,
    asked: Sequence[np.ndarray] | None = None,
) -> TreePlan:  # fmt: skip
    """The plan for `blocks` behind a prefix; see TreePlan. Blocks may be empty (the prefix alone).

    asked: for each block the places in it (at least one) that ask; the row's queries are then these, in order.
    """
    lengths = [block.length for block in blocks]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    asks = [len(places) for places in asked] if asked is not None else lengths
    ask_starts = np.concatenate([[0], np.cumsum(asks)]).astype(np.int64)
    buckets, key_rows, query_rows = [], [], []
    for members in _bucket_bounds(lengths):
        bucket = _make_bucket([blocks[number] for number in members])
        if asked is not None:
            bucket = _ask_only(bucket, [asked[number] for number in members])
        buckets.append(bucket)
        key_rows += [(starts[number] + np.arange(lengths[number]), bucket.keys) for number in members]
        query_rows += [(ask_starts[number] + np.arange(asks[number]), bucket.queries) for number in members]
    device = torch.device(device)
    key_slots = _slots(key_rows, int(starts[-1]), device)
    query_slots = key_slots if asked is None else _slots(query_rows, int(ask_starts[-1]), device)
    return TreePlan(prefix_length, prefix_keys, buckets, key_slots, query_slots, device, tuple(blocks))


@dataclass
class ForestPlan:
    """How runs of consecutive blocks attend, each behind a prefix of its own.

    trees: a plan for each run, in order. prefixes: the number of each run's prefix among all. lengths: tokens of all
    prefixes, which lie one behind the other.
    """

    trees: tuple[TreePlan, ...]
    prefixes: tuple[int, ...]
    lengths: tuple[int, ...]
    parts: list[Any] | None = None  # see TreePlan

    @property
    def rows_behind_a_prefix(self) -> bool:
        """See TreePlan: so in every tree."""
        return all(tree.rows_behind_a_prefix for tree in self.trees)

    @property
    def longest_path(self) -> int:
        """See TreePlan."""
        return max(tree.longest_path for tree in self.trees)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All runs' blocks, in order."""
        return tuple(block for tree in self.trees for block in tree.blocks)


Plan = TreePlan | ForestPlan


def plan_forest(
    runs: Sequence[tuple[int, Sequence[Block]]], lengths: Sequence[int], device: torch.device | str,
    asked: Sequence[np.ndarray] | None = None,
) -> Plan:  # fmt: skip
    """The plan for runs of blocks, each with the number of its prefix. lengths: tokens of every prefix.

    asked: for each block of all runs the places that ask (see plan_tree). One prefix needs no forest.
    """
    trees, first = [], 0
    for number, blocks in runs:
        places = asked[first : first + len(blocks)] if asked is not None else None
        trees.append(plan_tree(blocks, 0, lengths[number], device, places))
        first += len(blocks)
    if len(lengths) == 1:
        return trees[0]
    return ForestPlan(tuple(trees), tuple(number for number, _ in runs), tuple(lengths))
