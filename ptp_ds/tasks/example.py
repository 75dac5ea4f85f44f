"""One tokenised row of a task: what every wing above hands on and nothing here computes with."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Example:
    """One tokenised row of a task.

    context_ids: tokens up to the answer. movable: for each of them, whether a perturbation may change it (true for
    text of the example, false for special and template tokens). candidate_ids: tokens of every answer, in order.
    gold: the right candidate. index: the example's number in its split. group: examples judged together (MultiRC's
    questions), or -1. golds: all right candidates, none where the right one is unknown: only evaluated, not trained.
    names: candidates as the official answers spell them, where each row has its own. label: the official label where it
    isn't the right candidate's number but whether the first candidate is right (WSC). words: the word that each context
    token belongs to, in rising numbers; empty: each token is a word. attackable: which movable tokens an attack on the
    text may change; empty: all. prompt_at: context tokens before the soft prompt. prompt: which of several prompts, one
    behind the other in the trained values, this row has (SeparateRows alone: a prefix is the same for all rows).
    """

    context_ids: Sequence[int]
    movable: Sequence[bool]
    candidate_ids: Sequence[Sequence[int]]
    gold: int
    index: int
    group: int = -1
    golds: Sequence[int] | None = None
    names: Sequence[str] = ()
    label: int | None = None
    words: Sequence[int] = ()
    prompt_at: int = 0
    prompt: int = 0
    attackable: Sequence[bool] = ()

    @property
    def trainable(self) -> bool:
        """Whether its right answer is among the candidates."""
        return self.golds is None or bool(self.golds)

    @property
    def packed_length(self) -> int:
        """Tokens that one stream of this example adds to a packed row."""
        return len(self.context_ids) + sum(len(candidate) - 1 for candidate in self.candidate_ids)

    @property
    def path_length(self) -> int:
        """Tokens of the longest path from the context's start to a scored position."""
        return len(self.context_ids) + max(len(candidate) for candidate in self.candidate_ids) - 1
