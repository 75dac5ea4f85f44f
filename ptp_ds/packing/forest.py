"""Several rows as one, each on its own prompt: what a population of prompts trains on in one pass."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptp_ds.packing.row import PackedRow, Trunk


def join_rows(rows: Sequence[PackedRow], prompts: Sequence[int]) -> PackedRow:
    """`rows` one behind the other as one row; `prompts`: rows of each one's prompt, which lie in the same order.

    Examples stay as they are, and their blocks too: each stands on its own row's prompt. All rows have the same streams
    and read scores alike (ValueError). The joined row's scores are [S, sum of B, most C]; `parts` of them are each
    row's own.
    """
    kinds = {(row.streams, row.normalises) for row in rows}
    if len(kinds) != 1:
        raise ValueError(f"Rows of {len(kinds)} forms can't be joined: streams and normalisation are {sorted(kinds)}.")
    (streams, normalises), first = next(iter(kinds)), rows[0]
    width = max(row.present.shape[1] for row in rows)
    total = sum(row.num_examples for row in rows)
    tokens = _starts(row.num_tokens for row in rows)
    tensors: dict[str, Any] = {
        name: torch.cat([getattr(row, name) for row in rows])
        for name in ("token_ids", "position_ids", "movable", "pick_token", "gold", "shared_ids", "numbers")
    }
    tensors["example_of"] = _moved(rows, "example_of", _starts(len(row.lengths) for row in rows))
    tensors["pick_row"] = _moved(rows, "pick_row", _starts(sum(map(len, row.scored)) for row in rows))
    examples = _starts(row.num_examples for row in rows)
    cells = [_cells(row, start, total, width) for row, start in zip(rows, examples, strict=True)]
    tensors["pick_cell"] = torch.cat(cells)
    tensors["present"] = torch.cat(
        [torch.nn.functional.pad(row.present, (0, width - row.present.shape[1])) for row in rows]
    )
    if all(row.verbalizers is not None for row in rows):
        tensors["verbalizers"], tensors["pick_column"] = torch.unique(tensors["pick_token"], return_inverse=True)
    if any(row.slots is not None for row in rows):
        tensors["slots"] = _moved(rows, "slots", tokens)
        tensors["slot_of"] = _moved(rows, "slot_of", _starts(prompts))
    if any(row.moves_with is not None for row in rows):
        own = [torch.arange(row.num_tokens) if row.moves_with is None else row.moves_with for row in rows]
        tensors["moves_with"] = torch.cat([part + start for part, start in zip(own, tokens, strict=True)])
    return PackedRow(
        **tensors, blocks=_chained(rows, lambda row: row.blocks), scored=_chained(rows, lambda row: row.scored),
        example_ids=_chained(rows, lambda row: row.example_ids), streams=streams, normalises=normalises,
        members=_chained(rows, lambda row: row.members or (1,) * len(row.blocks)) if _any_members(rows) else (),
        targets=_chained(rows, lambda row: row.targets), columns=first.columns,
        trunks=tuple(
            Trunk(len(row.blocks), prompt, row.shared_ids.shape[0]) for row, prompt in zip(rows, prompts, strict=True)
        ),
    )  # fmt: skip


def _any_members(rows: Sequence[PackedRow]) -> bool:
    return any(row.members for row in rows)


def _starts(sizes: Any) -> list[int]:
    """Where each part begins among parts of these sizes."""
    return [0, *np.cumsum(list(sizes)).tolist()][:-1]


def _chained(rows: Sequence[PackedRow], of: Callable[[PackedRow], Sequence[Any]]) -> tuple[Any, ...]:
    return tuple(value for row in rows for value in of(row))


def _moved(rows: Sequence[PackedRow], name: str, starts: Sequence[int]) -> Tensor:
    """The rows' numbers in `name`, each moved by where its row's things begin."""
    return torch.cat([getattr(row, name) + start for row, start in zip(rows, starts, strict=True)])


def _cells(row: PackedRow, start: int, total: int, width: int) -> Tensor:
    """The row's score cells among [S, total, width], its examples beginning at `start`."""
    count, own = row.present.shape
    stream, place = row.pick_cell.div(count * own, rounding_mode="floor"), row.pick_cell % (count * own)
    example, candidate = place.div(own, rounding_mode="floor"), place % own
    return (stream * total + start + example) * width + candidate


def parts(row: PackedRow, rows: Sequence[PackedRow], scores_BC: Tensor) -> list[Tensor]:
    """Each joined row's own scores [its B, its C] of the whole row's."""
    pieces = scores_BC.split([part.num_examples for part in rows])
    return [piece[:, : part.present.shape[1]] for piece, part in zip(pieces, rows, strict=True)]
