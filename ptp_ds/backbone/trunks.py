"""What a row's blocks stand on, and the row cut into the chunks that a layer handles in one go."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ptp_ds.attention.plan import plan_forest, plan_tree
from ptp_ds.backbone.layerwise import Chunk, PrefixCache, detached
from ptp_ds.packing.row import Block, PackedRow


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

    def behind(self, row: PackedRow) -> Tensor:
        """[T] positions of the row's tokens, each behind its own prefix."""
        if len(self.lengths) == 1:
            return row.position_ids + self.length
        blocks, tokens = iter(row.blocks), []
        for trunk in row.trunks:
            tokens.append(sum(next(blocks).length for _ in range(trunk.blocks)))
        starts = np.repeat(np.array(self.lengths), tokens)
        return row.position_ids + torch.from_numpy(starts).to(row.position_ids.device)


def prefix_chunk(lengths: Sequence[int], device: torch.device) -> Chunk:
    """The prompts' tokens and those behind them: scored nowhere, attended to by the rows that stand on them."""
    nowhere, length = torch.empty(0, dtype=torch.int64, device=device), sum(lengths)
    if len(lengths) == 1:
        plan = plan_tree((), length, length, device)
    else:
        plan = plan_tree([Block(each, (0,), (-1,)) for each in lengths], 0, 0, device)
    return Chunk(length, plan, None, nowhere, is_prefix=True)


def cut_row(row: PackedRow, lengths: Sequence[int], most_tokens: int, max_rows: int | None = None) -> list[Chunk]:
    """The row cut between blocks: at most most_tokens tokens (or one block) and max_rows blocks a chunk."""
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
    return [
        _chunk(row, trunk_of, first, last, lengths)
        for first, last in zip(cuts, [*cuts[1:], len(row.blocks)], strict=True)
    ]


def _chunk(row: PackedRow, trunk_of: Sequence[int], first: int, last: int, lengths: Sequence[int]) -> Chunk:
    """Blocks `first` to `last` of the row, with a plan of their own."""
    blocks, scored = row.blocks[first:last], row.scored[first:last]
    device = row.token_ids.device
    starts, places = 0, []
    for block, asked in zip(blocks, scored, strict=True):
        places.append(starts + asked)
        starts += block.length
    numbered = groupby(range(first, last), key=trunk_of.__getitem__)
    runs = [(trunk, [row.blocks[number] for number in numbers]) for trunk, numbers in numbered]
    plan = plan_forest(runs, lengths, device)
    last_plan = plan_forest(runs, lengths, device, scored)
    places_N = torch.from_numpy(np.concatenate(places)).to(device)
    return Chunk(starts, plan, last_plan, places_N, targets=row.targets[first:last])
