"""What a row's blocks stand on, and how a row goes through the layers: cut into chunks, each with its plans."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ptp_ds.attention.flash import add_parts
from ptp_ds.attention.plan import plan_forest, plan_tree
from ptp_ds.backbone.layerwise import Chunk, PrefixCache, detached
from ptp_ds.packing.row import Block, PackedRow
from ptp_ds.packing.transfer import Move, moved


@dataclass(frozen=True)
class SharedPrefix:
    """lengths: tokens of each prefix that blocks stand on, one unless the row has several trunks. ids [their sum]:
    tokens that pass through the layers, the prompt's row p as -p - 1; or keys_values: keys and values of every layer,
    with their graph; neither where they are cached."""

    lengths: tuple[int, ...]
    ids: Tensor | None = None
    keys_values: PrefixCache | None = None

    @property
    def length(self) -> int:
        """Tokens of all prefixes."""
        return sum(self.lengths)

    def detached(self) -> "SharedPrefix":
        """The same without its graph."""
        if self.keys_values is None:
            return self
        return SharedPrefix(
            self.lengths, self.ids, {layer: detached(pairs) for layer, pairs in self.keys_values.items()}
        )

    def positions(self, device: torch.device) -> Tensor:
        """[their sum] each prefix token's position."""
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])


@dataclass(frozen=True)
class RowPlan:
    """How a row goes through the layers: made once on the host (`plan_row`), sent to the device at once.

    lengths: tokens of each prefix that blocks stand on. chunks: the row's, in order. prefix: that of all prefixes'
    tokens. starts [T]: how many tokens each of the row's stands behind; None where all stand behind one prefix.
    """

    lengths: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    prefix: Chunk
    starts: Tensor | None = None

    def mapped(self, move: Move) -> "RowPlan":
        """See Movable."""
        chunks = tuple(chunk.mapped(move) for chunk in self.chunks)
        prefix = self.prefix.mapped(move)
        return RowPlan(self.lengths, chunks, prefix, None if self.starts is None else move(self.starts))

    def to(self, device: torch.device) -> "RowPlan":
        """The same with its tensors on `device`, in one copy that nobody waits for."""
        return moved(self, device)

    def is_of(self, row: PackedRow, lengths: Sequence[int]) -> bool:
        """Whether it was made for such a row behind such prefixes."""
        return self.lengths == tuple(lengths) and sum(chunk.length for chunk in self.chunks) == row.num_tokens

    def positions(self, row: PackedRow) -> Tensor:
        """[T] positions of the row's tokens, each behind its own prefix."""
        return row.position_ids + (self.lengths[0] if self.starts is None else self.starts)


def plan_row(
    row: PackedRow, lengths: Sequence[int], most_tokens: int, max_rows: int | None = None, flash: bool = False
) -> RowPlan:
    """The row cut between blocks: at most most_tokens tokens (or one block) and max_rows blocks a chunk.

    lengths: see RowPlan. flash: whether a GPU's flash kernels will attend where they can.
    """
    cuts, tokens = [0], 0
    for number, block in enumerate(row.blocks):
        full = max_rows is not None and number - cuts[-1] >= max_rows
        if number > cuts[-1] and (full or tokens + block.length > most_tokens):
            cuts.append(number)
            tokens = 0
        tokens += block.length
    trunk_of = [0] * len(row.blocks)
    if len(lengths) > 1:
        trunk_of = [number for number, trunk in enumerate(row.trunks) for _ in range(trunk.blocks)]
    chunks = [
        _chunk(row, trunk_of, first, last, lengths)
        for first, last in zip(cuts, [*cuts[1:], len(row.blocks)], strict=True)
    ]
    for chunk in chunks if flash else ():
        add_parts(chunk.plan)
    starts = None
    if len(lengths) > 1:
        tokens_of = [block.length for block in row.blocks]
        starts = torch.from_numpy(np.repeat(np.array(lengths)[trunk_of], tokens_of))
    return RowPlan(tuple(lengths), tuple(chunks), prefix_chunk(lengths), starts)


def prefix_chunk(lengths: Sequence[int]) -> Chunk:
    """The prompts' tokens and those behind them, on the host: scored nowhere, attended to by the rows on them."""
    nowhere, length = torch.empty(0, dtype=torch.int64), sum(lengths)
    if len(lengths) == 1:
        plan = plan_tree((), length, length, "cpu")
    else:
        plan = plan_tree([Block(each, (0,), (-1,)) for each in lengths], 0, 0, "cpu")
    return Chunk(length, plan, None, nowhere, is_prefix=True)


def _chunk(row: PackedRow, trunk_of: Sequence[int], first: int, last: int, lengths: Sequence[int]) -> Chunk:
    """Blocks `first` to `last` of the row, with a plan of their own, on the host."""
    blocks, scored = row.blocks[first:last], row.scored[first:last]
    starts, places = 0, []
    for block, asked in zip(blocks, scored, strict=True):
        places.append(starts + asked)
        starts += block.length
    numbered = groupby(range(first, last), key=trunk_of.__getitem__)
    runs = [(trunk, [row.blocks[number] for number in numbers]) for trunk, numbers in numbered]
    plan, last_plan = plan_forest(runs, lengths, "cpu"), plan_forest(runs, lengths, "cpu", scored)
    places_N = torch.from_numpy(np.concatenate(places))
    return Chunk(starts, plan, last_plan, places_N, targets=row.targets[first:last])
