"""A batch as one packed row of tokens: no padding, every shared token once.

Layout of a row: the prefix (the soft prompt, and tokens that every context begins with), then one block per example and
stream. A block is a small tree of segments: the context, then its candidate branches. Shape letters, used in the whole
package:
B examples, S streams (1 clean, 2 clean + perturbed), C candidates, P prompt (prefix) tokens, T packed tokens
without the prefix, H width, L layers, V vocabulary, R rows of a bucket.

Scoring needs no branch token for the last token of a candidate (nothing follows it), so single-token candidates
(verbalizers) have no branch at all: their score is read at the end of the context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptp_ds.errors import UserError
from ptp_ds.kernels.perturb_step import add_delta
from ptp_ds.kernels.places import Places, add_at, places_of
from ptp_ds.packing.log_probs import picked_log_probs
from ptp_ds.packing.transfer import Move, moved
from ptp_ds.precision import at_least_fp32
from ptp_ds.tasks.example import Example


@dataclass(frozen=True)
class Block:
    """Tokens that attend to the prefix and to each other only: a tree of segments in depth-first order.

    starts[i]: offset of segment i in the block; parents[i]: the segment it continues, -1 for the block's root.
    causal: whether a token sees only those before it; an encoder's block is one segment whose tokens see each other.
    """

    length: int
    starts: tuple[int, ...]
    parents: tuple[int, ...]
    causal: bool = True

    def depths(self) -> np.ndarray:
        """[length] int: each token's distance from the end of the prefix (its position id less P)."""
        ends = (*self.starts[1:], self.length)
        depth = np.empty(self.length, dtype=np.int64)
        for start, end, parent in zip(self.starts, ends, self.parents, strict=True):
            base = 0 if parent < 0 else depth[ends[parent] - 1] + 1
            depth[start:end] = base + np.arange(end - start)
        return depth

    def visible(self) -> np.ndarray:
        """[length, length] bool: query i sees key j: j is not after i and lies on i's path to the root."""
        if not self.causal:
            return np.ones((self.length, self.length), dtype=bool)
        causal = np.tri(self.length, dtype=bool)
        if len(self.starts) == 1:
            return causal
        count = len(self.starts)
        on_path = np.eye(count, dtype=bool)
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                on_path[segment] |= on_path[parent]
        segment_of = np.repeat(np.arange(count), np.diff((*self.starts, self.length)))
        return causal & on_path[segment_of][:, segment_of]


@dataclass(frozen=True)
class Trunk:
    """What consecutive blocks of a row stand on: a prompt of `prompt` rows, and `shared` tokens behind it.

    blocks: how many blocks. The prompts' rows, and the tokens, lie one trunk's behind the other's.
    """

    blocks: int
    prompt: int
    shared: int = 0


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """B examples x S streams as one row of T tokens; plain data, all tensors on one device.

    shared_ids [I]: tokens behind the prompt that every example begins with, part of the prefix and not of any block.
    token_ids, position_ids [T] (positions count from the end of the prefix), movable [T] bool, example_of [T]: the
    example a token belongs to, in [0, S*B), or [0, B) where an example's blocks hold both streams (text twins).
    blocks: host-side shape of each block, stream by stream. members: blocks of each example, empty for one each.
    slots, slot_of [n]: tokens that stand for a row of the prompt, and which: where the prompt lies in the blocks.
    targets: for each block the answers that a decoder scores, if there is one.
    moves_with [T]: the token whose delta a token takes, where an example's blocks repeat its context; else None.
    scored: for each block, the places in it whose logits are needed, in order, N in all. pick_row, pick_token,
    pick_cell [M]: candidate token m is read at logits[pick_row[m], pick_token[m]] and added to flat score cell
    pick_cell[m] of [S*B*C]. normalises: whether a score is a log-probability, as of a vocabulary, or the logit itself.
    present [B, C] bool: which candidates exist (ragged counts). gold [B]. example_ids [B]: row numbers of the split;
    numbers [B]: the same on the device (S of each where streams were joined). verbalizers [n], pick_column [M]: where
    every candidate is one token, read at one place a row: the tokens that candidates are, where among them each is.
    columns [n]: the tokens that logits are wanted of, in order; None for the whole vocabulary. trunks: where blocks
    stand on several prompts, what each run of them stands on (ptp_ds.packing.forest); shared_ids are then all trunks'.
    """

    token_ids: Tensor
    position_ids: Tensor
    movable: Tensor
    example_of: Tensor
    blocks: tuple[Block, ...]
    scored: tuple[np.ndarray, ...]
    pick_row: Tensor
    pick_token: Tensor
    pick_cell: Tensor
    present: Tensor
    gold: Tensor
    example_ids: tuple[int, ...]
    shared_ids: Tensor
    numbers: Tensor
    verbalizers: Tensor | None = None
    pick_column: Tensor | None = None
    columns: Tensor | None = None
    streams: int = 1
    members: tuple[int, ...] = ()
    slots: Tensor | None = None
    slot_of: Tensor | None = None
    moves_with: Tensor | None = None
    targets: tuple[tuple[tuple[int, ...], ...], ...] = ()
    normalises: bool = True
    trunks: tuple[Trunk, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_examples(self) -> int:
        return self.gold.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example, in row order."""
        sizes = [block.length for block in self.blocks]
        if not self.members:
            return sizes
        ends = np.cumsum(self.members)
        return [sum(sizes[end - count : end]) for count, end in zip(self.members, ends, strict=True)]

    @cached_property
    def places(self) -> Places:
        """Where tokens lie among examples, for the kernels."""
        return places_of(self.movable, self.example_of, self.numbers, self.moves_with)

    @cached_property
    def input_ids(self) -> Tensor:
        """[T] the row's tokens; where the prompt's row p stands, -p - 1."""
        if self.slots is None or self.slot_of is None:
            return self.token_ids
        return self.token_ids.index_copy(0, self.slots, -self.slot_of - 1)

    def narrowed(self) -> "PackedRow":
        """The same row for logits [N, n] of the verbalizers alone; its scores are those logits, not normalised.

        The softmax over candidates, which losses see, is the same.
        """
        assert self.pick_column is not None, "only rows with verbalizers can be narrowed"
        return replace(self, pick_token=self.pick_column, normalises=False, columns=self.verbalizers)

    def mapped(self, move: Move) -> "PackedRow":
        """The same row with `move` of its tensors."""
        held = {one.name: getattr(self, one.name) for one in fields(self)}
        tensors: dict[str, Any] = {name: move(value) for name, value in held.items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> "PackedRow":
        """The same row with its tensors on `device`, in one copy that nobody waits for."""
        return moved(self, device)

    def with_twin(self, twin: "PackedRow") -> "PackedRow":
        """This row followed by its perturbed twin (the same examples): streams add up, present and gold stay."""
        if twin.num_examples != self.num_examples:
            raise UserError(f"A twin must hold the same {self.num_examples} examples, not {twin.num_examples}.")
        cells = self.streams * self.present.numel()
        joined = {
            "token_ids": (self.token_ids, twin.token_ids),
            "position_ids": (self.position_ids, twin.position_ids),
            "movable": (self.movable, twin.movable),
            "example_of": (self.example_of, twin.example_of + len(self.lengths)),
            "numbers": (self.numbers, twin.numbers),
            "pick_row": (self.pick_row, twin.pick_row + sum(map(len, self.scored))),
            "pick_token": (self.pick_token, twin.pick_token),
            "pick_cell": (self.pick_cell, twin.pick_cell + cells),
        }
        tensors: dict[str, Any] = {name: torch.cat(pair) for name, pair in joined.items()}
        if self.slots is not None and self.slot_of is not None and twin.slots is not None and twin.slot_of is not None:
            tensors["slots"] = torch.cat([self.slots, twin.slots + self.num_tokens])
            tensors["slot_of"] = torch.cat([self.slot_of, twin.slot_of])
        if self.pick_column is not None and twin.pick_column is not None:
            tensors["pick_column"] = torch.cat([self.pick_column, twin.pick_column])
        if self.moves_with is not None and twin.moves_with is not None:
            tensors["moves_with"] = torch.cat([self.moves_with, twin.moves_with + self.num_tokens])
        return replace(
            self,
            **tensors,
            members=self.members + twin.members,
            targets=self.targets + twin.targets,
            blocks=self.blocks + twin.blocks,
            scored=self.scored + twin.scored,
            streams=self.streams + twin.streams,
        )

    def moved(self, clean_TH: Tensor, delta_TH: Tensor) -> Tensor:
        """[T, H] inputs with each token's delta, rounded once to the inputs' dtype."""
        return add_delta(clean_TH, delta_TH, self.moves_with)

    def scores(self, logits_NV: Tensor) -> Tensor:
        """[S, B, C] in fp32 or better: log-probability of each candidate, summed over its tokens; -inf where absent."""
        if self.normalises:
            log_probs = picked_log_probs(logits_NV, self.pick_row, self.pick_token)
        else:
            log_probs = at_least_fp32(logits_NV)[self.pick_row, self.pick_token]
        flat = add_at(log_probs.new_zeros(self.streams * self.present.numel()), self.pick_cell, log_probs)
        scores = flat.view(self.streams, *self.present.shape)
        return scores.masked_fill(~self.present, float("-inf"))


class Packer:
    """Gathers blocks, scored places and picks, example by example."""

    def __init__(self, examples: Sequence[Example], streams: int, shared: int = 0) -> None:
        if not examples:
            raise UserError("Can't pack an empty batch; give at least one example.")
        for example in examples:
            if not example.context_ids or not all(example.candidate_ids):
                raise UserError(f"Row {example.index} has an empty context or candidate; every one needs a token.")
        if shared and shared > shared_start(examples):
            raise UserError(f"The examples don't all begin with the same {shared} tokens that stay as they are.")
        self.examples, self.streams, self.shared = examples, streams, shared
        self.width = max(len(example.candidate_ids) for example in examples)
        self.tokens: list[int] = []
        self.movable: list[bool] = []
        self.blocks: list[Block] = []
        self.scored: list[np.ndarray] = []
        self.picks: list[tuple[int, int, int]] = []
        self.rows = 0
        self._open()

    def _open(self) -> None:
        self._starts: list[int] = []
        self._parents: list[int] = []
        self._length = 0
        self._places: dict[int, int] = {}

    def segment(self, ids: Sequence[int], movable: Sequence[bool], parent: int) -> int:
        """Appends a segment to the open block and returns its number; an empty one is its parent."""
        if not len(ids):
            return parent
        self._starts.append(self._length)
        self._parents.append(parent)
        self.tokens.extend(ids)
        self.movable.extend(movable)
        self._length += len(ids)
        return len(self._starts) - 1

    def _row_of(self, place: int) -> int:
        """The logits' row of a place of the open block, the same one whenever it is asked for."""
        return self.rows + self._places.setdefault(place, len(self._places))

    def answers(self, number: int, stream: int, context: int) -> None:
        """Appends example `number`'s candidates as branches behind segment `context` and notes where each is scored."""
        ends = [*self._starts[1:], self._length]
        root = self._row_of(ends[context] - 1)
        cells = (stream * len(self.examples) + number) * self.width
        for cell, candidate in enumerate(self.examples[number].candidate_ids, start=cells):
            branch = candidate[:-1]
            start = self._length
            self.segment(branch, [False] * len(branch), context)
            rows = [root, *(self._row_of(start + place) for place in range(len(branch)))]
            self.picks.extend((row, token, cell) for row, token in zip(rows, candidate, strict=True))

    def close(self) -> None:
        """Ends the open block."""
        self.blocks.append(Block(self._length, tuple(self._starts), tuple(self._parents)))
        self.scored.append(np.array(list(self._places)))
        self.rows += len(self._places)
        self._open()

    def row(self) -> PackedRow:
        present = torch.zeros(len(self.examples), self.width, dtype=torch.bool)
        for number, example in enumerate(self.examples):
            present[number, : len(example.candidate_ids)] = True
        lengths = torch.tensor([block.length for block in self.blocks])
        pick_row, pick_token, pick_cell = torch.tensor(self.picks).unbind(1)
        verbalizers, pick_column = verbalizers_of(self.examples, pick_token)
        return PackedRow(
            token_ids=torch.tensor(self.tokens),
            position_ids=torch.from_numpy(np.concatenate([block.depths() for block in self.blocks])),
            movable=torch.tensor(self.movable),
            example_of=torch.repeat_interleave(torch.arange(len(self.blocks)), lengths),
            blocks=tuple(self.blocks),
            scored=tuple(self.scored),
            pick_row=pick_row.contiguous(),
            pick_token=pick_token.contiguous(),
            pick_cell=pick_cell.contiguous(),
            present=present,
            gold=torch.tensor([example.gold for example in self.examples]),
            example_ids=tuple(example.index for example in self.examples),
            shared_ids=torch.tensor(self.examples[0].context_ids[: self.shared], dtype=torch.int64),
            numbers=torch.tensor([example.index for example in self.examples]),
            verbalizers=verbalizers,
            pick_column=pick_column,
            streams=self.streams,
        )


def verbalizers_of(examples: Sequence[Example], pick_token_M: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(distinct tokens that candidates are, the place of each picked one among them); (None, None) for longer ones."""
    if any(len(candidate) != 1 for example in examples for candidate in example.candidate_ids):
        return None, None
    return torch.unique(pick_token_M, return_inverse=True)


def shared_start(examples: Sequence[Example]) -> int:
    """Tokens that all contexts begin with and nothing may move: an instruction, a start token. Each keeps one more."""
    first = examples[0].context_ids
    longest = min(len(example.context_ids) for example in examples) - 1
    for place in range(longest):
        if any(example.movable[place] or example.context_ids[place] != first[place] for example in examples):
            return place
    return max(0, longest)


def pack(examples: Sequence[Example], shared: int = 0) -> PackedRow:
    """Packs examples into one clean row (S = 1) on the CPU; see PackedRow.

    shared: leading tokens of every context that go into the prefix, at most shared_start(examples). Raises ValueError
    for more, for no examples, an empty context or an empty candidate.
    """
    packer = Packer(examples, 1, shared)
    for number, example in enumerate(examples):
        context = packer.segment(example.context_ids[shared:], example.movable[shared:], -1)
        packer.answers(number, 0, context)
        packer.close()
    return packer.row()


def _first_change(clean: Sequence[int], twin: Sequence[int], movable: Sequence[bool]) -> int:
    """The first place where the streams differ, in a token or in one that may get a delta."""
    pairs = zip(clean, twin, movable, strict=False)
    return next((n for n, (a, b, moves) in enumerate(pairs) if a != b or moves), min(len(clean), len(twin)))


def pack_text_twins(
    examples: Sequence[Example], twins: Sequence[Sequence[int]], movable: Sequence[Sequence[bool]] | None = None,
    shared: int = 0,
) -> PackedRow:  # fmt: skip
    """Packs examples with their text-perturbed contexts into one row (S = 2): tokens before the first change once.

    twins: for each example its changed context_ids, of any length. movable: which of their tokens may get a delta as
    well, behind the first change; the clean stream's may not. A block is a tree: the shared start, the rest of the
    clean context with its candidates, the rest of the changed one with the same candidates. shared: as in pack; fewer
    where a twin begins otherwise, or has no more tokens than these.
    """
    if len(twins) != len(examples) or not all(twins):
        raise UserError(f"Each of the {len(examples)} examples needs one twin of at least one token.")
    moves = movable if movable is not None else [[False] * len(twin) for twin in twins]
    contexts = [example.context_ids for example in examples]
    changes = [_first_change(*streams) for streams in zip(contexts, twins, moves, strict=True)]
    shared = min(shared, *changes, *(len(twin) - 1 for twin in twins))
    packer = Packer(examples, 2, shared)
    for number, (clean, twin, common) in enumerate(zip(contexts, twins, changes, strict=True)):
        start = packer.segment(clean[shared:common], [False] * (common - shared), -1)
        context = packer.segment(clean[common:], [False] * (len(clean) - common), start)
        packer.answers(number, 0, context)
        changed = packer.segment(twin[common:], moves[number][common:], start)
        packer.answers(number, 1, changed)
        packer.close()
    return packer.row()
