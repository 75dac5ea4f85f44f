"""How a packed row attends: buckets of blocks of similar length, their masks, and where each token lies in them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptp_ds.packing.row import Block
from ptp_ds.packing.transfer import Move, moved

WORTH_A_CALL = 6000  # hidden entries of a mask that cost as much as one more attention call (fp32, 2 cores)
_SHRINK = 0.7  # a bucket holds blocks down to this share of its longest: more buckets mean less padding, more calls


@dataclass
class Bucket:
    """R blocks padded to K keys and Q queries a block.

    visible [1 or R, Q, K] bool; query_depth [1 or R, Q] and key_depth [1 or R, K]: positions behind the prefix.
    """

    rows: int
    queries: int
    keys: int
    visible: Tensor
    query_depth: Tensor
    key_depth: Tensor

    def mapped(self, move: Move) -> "Bucket":
        """See Movable."""
        visible, query_depth, key_depth = (move(x) for x in (self.visible, self.query_depth, self.key_depth))
        return replace(self, visible=visible, query_depth=query_depth, key_depth=key_depth)


@dataclass(frozen=True)
class Slots:
    """Where tokens lie in the buckets: to_padded [sum R*length]: token of a slot, to_packed [T]: slot of a token."""

    to_padded: Tensor
    to_packed: Tensor

    def mapped(self, move: Move) -> "Slots":
        """See Movable."""
        return Slots(move(self.to_padded), move(self.to_packed))


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
    case. key_slots, query_slots: the same where every token asks; the last layer asks at scored positions only. All
    tensors lie on one device, but buckets' on the host where the parts serve in their place.
    """

    prefix_length: int
    prefix_keys: int
    buckets: list[Bucket]
    key_slots: Slots
    query_slots: Slots
    blocks: tuple[Block, ...] = ()
    parts: list[Any] | None = None  # ptp_ds.attention.flash's, made at first use or before
    layouts: dict[tuple[int, int], Any] = field(default_factory=dict)  # ptp_ds.attention.dense's, by heads
    _cover: list[Piece] | None = None
    _inner: list[tuple[slice, slice]] = field(default_factory=list)
    _masks: dict = field(default_factory=dict)

    def mapped(self, move: Move, buckets: bool = True) -> "TreePlan":
        """See Movable. buckets: whether they go along where there are no parts."""
        slots = self.key_slots.mapped(move)
        asking = slots if self.every_token_asks else self.query_slots.mapped(move)
        parts = None if self.parts is None else [part.mapped(move) for part in self.parts]
        own = [one.mapped(move) for one in self.buckets] if buckets and parts is None else self.buckets
        return TreePlan(self.prefix_length, self.prefix_keys, own, slots, asking, self.blocks, parts)

    @property
    def device(self) -> torch.device:
        """Where the row's tokens lie."""
        return self.key_slots.to_packed.device

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
        """[1, 1, length, length] additive mask of one block's own tokens, on a CPU; None where it is causal."""
        block = self.blocks[number]
        if len(block.starts) == 1:
            return None
        key = ("block", number, dtype)
        if key not in self._masks:
            hidden = torch.from_numpy(~block.visible())
            additive = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            self._masks[key] = additive[None, None]
        return self._masks[key]

    def mask(self, bucket: int, dtype: torch.dtype, groups: int, window: int | None) -> Tensor:
        """[1 or R, 1, groups * Q, P + K] additive mask of a bucket, made once per plan; -1 is the prefix."""
        key = (bucket, dtype, groups, window)
        if key not in self._masks:
            self._masks[key] = self._make_mask(bucket, dtype, groups, window)
        return self._masks[key]

    def _make_mask(self, bucket: int, dtype: torch.dtype, groups: int, window: int | None) -> Tensor:
        prefix = torch.arange(self.prefix_keys, device=self.device)
        if bucket < 0:
            visible = torch.ones(1, self.prefix_keys, self.prefix_keys, dtype=torch.bool, device=self.device).tril()
            keys = queries = prefix[None]
        else:
            shape = self.buckets[bucket] = moved(self.buckets[bucket], self.device)
            to_prefix = shape.visible.new_ones(*shape.visible.shape[:2], self.prefix_keys)
            visible = torch.cat([to_prefix, shape.visible], dim=2)
            queries, own = shape.query_depth + self.prefix_keys, shape.key_depth + self.prefix_keys
            keys = torch.cat([prefix.expand(own.shape[0], -1), own], dim=1)
        if window is not None:
            visible = visible & ((queries[:, :, None] - keys[:, None, :]).abs() < window)
        additive = torch.zeros(visible.shape, dtype=dtype, device=self.device)
        additive.masked_fill_(~visible, torch.finfo(dtype).min)
        return additive.repeat(1, groups, 1)[:, None]


def _bucket_bounds(lengths: Sequence[int]) -> list[list[int]]:
    """Block numbers, longest first, cut where a block is shorter than _SHRINK of its bucket's longest."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    bounds: list[list[int]] = []
    for number in order:
        if not bounds or lengths[number] < _SHRINK * lengths[bounds[-1][0]]:
            bounds.append([])
        bounds[-1].append(number)
    return bounds


def _make_bucket(members: Sequence[Block], asked: Sequence[np.ndarray] | None) -> Bucket:
    """asked: the places of each member that ask; all of them for None."""
    longest = max(block.length for block in members)
    if all(
        len(block.starts) == 1 and block.causal for block in members
    ):  # causal inside: padding lies behind every real query
        visible, depth = np.tri(longest, dtype=bool)[None], np.arange(longest)[None]
    else:
        visible = np.zeros((len(members), longest, longest), dtype=bool)
        depth = np.zeros((len(members), longest), dtype=np.int64)
        for row, block in enumerate(members):
            visible[row, : block.length, : block.length] = block.visible()
            visible[row, block.length :, 0] = True  # a padding query must see something, or softmax gives NaN
            depth[row, : block.length] = block.depths()
    asking = depth
    if asked is not None:
        visible, asking = _ask_only(visible, depth, asked)
    seen, asking_T, depth_T = (torch.from_numpy(x) for x in (visible, asking, depth))
    return Bucket(len(members), asking.shape[1], longest, seen, asking_T, depth_T)


def _ask_only(visible: np.ndarray, depth: np.ndarray, asked: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(visible, depths) of queries at some tokens of each member only; a short list is padded with its first token."""
    most = max(len(places) for places in asked)
    places_RQ = np.stack([np.concatenate([p, np.repeat(p[:1], most - len(p))]) for p in asked])
    visible = np.broadcast_to(visible, (len(asked), *visible.shape[1:]))
    depth = np.broadcast_to(depth, (len(asked), depth.shape[1]))
    return (
        np.take_along_axis(visible, places_RQ[:, :, None], axis=1),
        np.take_along_axis(depth, places_RQ, axis=1),
    )


def _slots(members: Sequence[tuple[np.ndarray, int]], count: int) -> Slots:
    """members: (token numbers, bucket length) of each bucket row in order; padding repeats the row's first token."""
    padded, to_packed, slot = [], np.empty(count, dtype=np.int64), 0
    for tokens, length in members:
        padded.append(np.concatenate([tokens, np.repeat(tokens[:1], length - len(tokens))]))
        to_packed[tokens] = slot + np.arange(len(tokens))
        slot += length
    to_padded = np.concatenate(padded) if padded else np.empty(0, dtype=np.int64)
    return Slots(torch.from_numpy(to_padded), torch.from_numpy(to_packed))


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
        asking = None if asked is None else [asked[number] for number in members]
        bucket = _make_bucket([blocks[number] for number in members], asking)
        buckets.append(bucket)
        key_rows += [(starts[number] + np.arange(lengths[number]), bucket.keys) for number in members]
        query_rows += [(ask_starts[number] + np.arange(asks[number]), bucket.queries) for number in members]
    key_slots = _slots(key_rows, int(starts[-1]))
    query_slots = key_slots if asked is None else _slots(query_rows, int(ask_starts[-1]))
    return moved(TreePlan(prefix_length, prefix_keys, buckets, key_slots, query_slots, tuple(blocks)), device)


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

    def mapped(self, move: Move) -> "ForestPlan":
        """See Movable."""
        trees = tuple(tree.mapped(move, buckets=self.parts is None) for tree in self.trees)
        parts = None if self.parts is None else [part.mapped(move) for part in self.parts]
        return ForestPlan(trees, self.prefixes, self.lengths, parts)

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
