"""How examples become packed rows: trees behind a prefix (causal models), or every context on its own (all others).

Both offer the same functions, so that training and evaluation need not know which kind of model they serve.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ptp_ds.errors import UserError
from ptp_ds.packing.groups import group_length, pack_groups, share_contexts
from ptp_ds.packing.row import Block, PackedRow, pack, pack_text_twins, shared_start, verbalizers_of
from ptp_ds.tasks.example import Example

Moves = Sequence[Sequence[bool]]
Places = Sequence[int | None]


@dataclass(frozen=True)
class TreeRows:
    """For causal models: candidates branch off their context, twins off their first change; see ptp_ds.packing.row.

    prompt: a soft prompt's prefix also takes what all rows begin with.
    """

    prompt: str = "soft"
    extra_tokens: int = 0  # tokens of a row beside its context and all but one of its answer's

    def shared_start(self, examples: Sequence[Example]) -> int:
        """Tokens of the examples' common start that go into the prefix: none behind a deep prompt."""
        return shared_start(examples) if self.prompt == "soft" else 0

    def context_places(self, example: Example, shared: int) -> list[int]:
        """Where each token of a context lies among its example's tokens; negative in the prefix."""
        return list(range(-shared, len(example.context_ids) - shared))

    def length(self, example: Example) -> int:
        """Tokens of one stream of the example, the shared start included."""
        return example.packed_length

    def pack(self, examples: Sequence[Example], shared: int = 0) -> PackedRow:
        """One clean row."""
        return pack(examples, shared)

    def pack_twins(
        self, examples: Sequence[Example], twins: Sequence[Sequence[int]], movable: Moves | None = None,
        shared: int = 0, prompt_at: Places | None = None,
    ) -> PackedRow:  # fmt: skip
        """Clean contexts and their twins. prompt_at: see SeparateRows; here the prompt is in front of all."""
        if any(prompt_at or ()):
            raise UserError("The prompt stands in front of every row here; give no Twin a prompt_at.")
        return pack_text_twins(examples, twins, movable, shared)

    def groups(self, examples: Sequence[Example], budget: int) -> list[list[int]]:
        """Numbers of examples that are scored together because they share a context."""
        return share_contexts(examples, budget)

    def group_length(self, group: Sequence[Example]) -> int:
        """Tokens of a group."""
        return group_length(group)

    def pack_groups(self, groups: Sequence[Sequence[Example]], shared: int = 0) -> PackedRow:
        """One row of groups, for scoring alone."""
        return pack_groups(groups, shared)


@dataclass(frozen=True, kw_only=True)
class SeparateRows:
    """For models that share nothing between rows: every block is one whole input, the soft prompt in front.

    kind: masked (the answer's tokens are masks behind the context: one block for each answer length), classes (pooled
    at the first token; a block an answer where answers differ from row to row: `choice`), causal (a block a candidate)
    or seq2seq (a block an example, for the encoder; the decoder scores its answers). prompt_length: P virtual tokens in
    each block, behind the first Example.prompt_at tokens, 0 for a deep prompt. tail: the tokenizer's special tokens
    behind a text. A row takes the Example.prompt-th of the values' prompts, so rows of several tasks, each with its own
    prompt, share a pass. target: what a delta moves, the example's own words (input), its copy of the prompt, or both.
    """

    kind: str
    prompt_length: int
    mask_id: int = 0
    tail: tuple[int, ...] = ()
    choice: bool = False
    target: str = "input"

    @property
    def extra_tokens(self) -> int:
        """Tokens of a row beside its context and all but one of its answer's."""
        return 0 if self.kind == "causal" else 1 + len(self.tail)

    def shared_start(self, examples: Sequence[Example]) -> int:
        """Nothing is shared."""
        return 0

    def context_places(self, example: Example, shared: int) -> list[int]:
        """Where each token of a context lies among its example's tokens."""
        at, count = example.prompt_at, len(example.context_ids)
        return [*range(at), *range(at + self.prompt_length, count + self.prompt_length)]

    def length(self, example: Example) -> int:
        """Tokens of one stream of the example: all its blocks."""
        contexts = len(example.context_ids) + self.prompt_length
        return sum(contexts + len(ids) for ids, _ in self.inputs(example))

    def inputs(self, example: Example) -> list[tuple[list[int], list[int]]]:
        """(tokens behind the context, the candidates that they score) of each block."""
        if self.kind == "classes" and self.choice:  # two equal answers are still two
            return [([*candidate, *self.tail], [n]) for n, candidate in enumerate(example.candidate_ids)]
        if self.kind in ("classes", "seq2seq"):
            return [(list(self.tail), list(range(len(example.candidate_ids))))]
        found: dict[tuple[int, ...], list[int]] = {}
        for number, candidate in enumerate(example.candidate_ids):
            masks = (*[self.mask_id] * len(candidate), *self.tail)
            found.setdefault(masks if self.kind == "masked" else tuple(candidate[:-1]), []).append(number)
        return [(list(behind), numbers) for behind, numbers in found.items()]

    def pack(self, examples: Sequence[Example], shared: int = 0) -> PackedRow:
        """One clean row."""
        packer = _Separate(self, examples, 1)
        for number, example in enumerate(examples):
            words = [moves and self.target != "prompt" for moves in example.movable]
            packer.add(number, 0, example.context_ids, words, prompt_moves=self.target != "input")
            packer.end_example()
        return packer.row()

    def pack_twins(
        self, examples: Sequence[Example], twins: Sequence[Sequence[int]], movable: Moves | None = None,
        shared: int = 0, prompt_at: Places | None = None,
    ) -> PackedRow:  # fmt: skip
        """Clean contexts and their twins, each example's blocks behind each other.

        prompt_at: tokens before the prompt in each twin; None for as many as in the clean context, of the same length.
        """
        packer = _Separate(self, examples, 2)
        given = prompt_at if prompt_at is not None else [None] * len(twins)
        for number, (example, twin) in enumerate(zip(examples, twins, strict=True)):
            moves = movable[number] if movable is not None else [False] * len(twin)
            packer.add(number, 0, example.context_ids, [False] * len(example.context_ids))
            packer.add(number, 1, twin, moves, at=_place_in_twin(example, twin, given[number]))
            packer.end_example()
        return packer.row()

    def groups(self, examples: Sequence[Example], budget: int) -> list[list[int]]:
        """Each example alone."""
        return [[number] for number in range(len(examples))]

    def group_length(self, group: Sequence[Example]) -> int:
        """Tokens of a group."""
        return sum(self.length(example) for example in group)

    def pack_groups(self, groups: Sequence[Sequence[Example]], shared: int = 0) -> PackedRow:
        """One row of groups, for scoring alone."""
        return self.pack([example for group in groups for example in group])


Rows = TreeRows | SeparateRows


def _place_in_twin(example: Example, twin: Sequence[int], given: int | None) -> int:
    """How many of a twin's tokens stand before the prompt; UserError where that isn't known."""
    length = len(example.context_ids)
    if given is None and example.prompt_at and len(twin) != length:
        raise UserError(
            f"Row {example.index} has the prompt behind {example.prompt_at} of its {length} tokens, and its twin has "
            f"{len(twin)} tokens; give such a Twin prompt_at, the number of its tokens before the prompt."
        )
    at = example.prompt_at if given is None else given
    if not 0 <= at <= len(twin):
        raise UserError(f"Row {example.index}: its Twin's prompt_at is {at}; expected 0 to {len(twin)}, its tokens.")
    return at


@dataclass
class _Separate:
    """Gathers blocks, scored places and picks, block by block."""

    rows: SeparateRows
    examples: Sequence[Example]
    streams: int
    tokens: list[int] = field(default_factory=list)
    movable: list[bool] = field(default_factory=list)
    moves_with: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    slot_of: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    scored: list[list[int]] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    picks: list[tuple[int, int, int]] = field(default_factory=list)
    targets: list[tuple[tuple[int, ...], ...]] = field(default_factory=list)
    asked: int = 0

    def add(
        self, number: int, stream: int, context: Sequence[int], movable: Sequence[bool], prompt_moves: bool = False,
        at: int | None = None,
    ) -> None:  # fmt: skip
        """All blocks of one stream of example `number`; only the first one's context moves, the others' with it.

        at: tokens before the prompt, the example's for None.
        """
        example, head = self.examples[number], self.rows.prompt_length
        if not context or not all(example.candidate_ids):
            raise UserError(f"Row {example.index} has an empty context or candidate; every one needs a token.")
        width = max(len(other.candidate_ids) for other in self.examples)
        first = len(self.tokens)
        at = example.prompt_at if at is None else at
        for repeat, (behind, numbers) in enumerate(self.rows.inputs(example)):
            start = len(self.tokens)
            self.slots.extend(range(start + at, start + at + head))
            self.slot_of.extend(range(example.prompt * head, (example.prompt + 1) * head))
            self.tokens += [*context[:at], *[0] * head, *context[at:], *behind]
            moves = [*movable[:at], *[prompt_moves] * head, *movable[at:]]
            self.movable += [*(moves if repeat == 0 else [False] * len(moves)), *[False] * len(behind)]
            self.moves_with += [*range(first, first + head + len(context))]
            self.moves_with += range(start + head + len(context), len(self.tokens))
            self._score(example, numbers, head + len(context), (stream * len(self.examples) + number) * width)
            length = len(self.tokens) - start
            self.blocks.append(Block(length, (0,), (-1,), causal=self.rows.kind == "causal"))

    def _score(self, example: Example, numbers: Sequence[int], end: int, cell: int) -> None:
        """Notes where candidates `numbers` are read in the block whose context ends before place `end`."""
        if self.rows.kind == "seq2seq":
            self._score_decoded(example, cell)
            return
        most = max(len(example.candidate_ids[number]) for number in numbers)
        first = {"masked": end, "causal": end - 1, "classes": 0}[self.rows.kind]
        places = [first + offset for offset in range(most if self.rows.kind != "classes" else 1)]
        for number in numbers:
            if self.rows.kind == "classes":
                self.picks.append((self.asked, 0 if self.rows.choice else number, cell + number))
                continue
            for offset, token in enumerate(example.candidate_ids[number]):
                self.picks.append((self.asked + offset, token, cell + number))
        self.scored.append(places)
        self.asked += len(places)

    def _score_decoded(self, example: Example, cell: int) -> None:
        """Every answer's tokens, one after the other: places of the decoder, not of the block."""
        for number, candidate in enumerate(example.candidate_ids):
            self.picks += [(self.asked + offset, token, cell + number) for offset, token in enumerate(candidate)]
            self.asked += len(candidate)
        self.targets.append(tuple(tuple(candidate) for candidate in example.candidate_ids))
        self.scored.append([0] * sum(map(len, example.candidate_ids)))

    def end_example(self) -> None:
        """The blocks since the last call are one example's."""
        self.members.append(len(self.blocks) - sum(self.members))

    def row(self) -> PackedRow:
        """The packed row of what was added."""
        examples = self.examples
        if not examples:
            raise UserError("Can't pack an empty batch; give at least one example.")
        width = max(len(example.candidate_ids) for example in examples)
        counts = torch.tensor([len(example.candidate_ids) for example in examples])
        pick_row, pick_token, pick_cell = torch.tensor(self.picks).unbind(1)
        slots = torch.tensor(self.slots, dtype=torch.int64)
        owners = torch.repeat_interleave(torch.arange(len(self.members)), torch.tensor(self.members))
        narrows = self.rows.kind in ("masked", "causal")  # a decoder reads each answer in a row of its own
        verbalizers, pick_column = verbalizers_of(examples, pick_token) if narrows else (None, None)
        return PackedRow(
            token_ids=torch.tensor(self.tokens),
            position_ids=torch.from_numpy(np.concatenate([block.depths() for block in self.blocks])),
            movable=torch.tensor(self.movable), blocks=tuple(self.blocks),
            example_of=torch.repeat_interleave(owners, torch.tensor([block.length for block in self.blocks])),
            scored=tuple(np.array(places) for places in self.scored),
            pick_row=pick_row.contiguous(), pick_token=pick_token.contiguous(), pick_cell=pick_cell.contiguous(),
            present=torch.arange(width) < counts[:, None], gold=torch.tensor([example.gold for example in examples]),
            example_ids=tuple(example.index for example in examples), shared_ids=torch.empty(0, dtype=torch.int64),
            numbers=torch.tensor([example.index for example in examples]), verbalizers=verbalizers,
            pick_column=pick_column,
            streams=self.streams, members=tuple(self.members), slots=slots,
            slot_of=torch.tensor(self.slot_of, dtype=torch.int64),
            moves_with=torch.tensor(self.moves_with) if len(self.blocks) > len(examples) else None,
            targets=tuple(self.targets),
            normalises=self.rows.kind != "classes",
        )  # fmt: skip
