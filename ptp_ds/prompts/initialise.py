"""Initial prompts: embeddings of random vocabulary rows, of a text, of the class words, or a saved adapter.

All but the adapter start on the embedding manifold; random vectors off it train much worse (Lester et al. 2021).
"""

from collections.abc import Sequence
from typing import Any

import torch

from ptp_ds.errors import UserError
from ptp_ds.seeding import make_generator


def initial_ids(
    kind: str, length: int, tokenizer: Any, vocabulary: int, *, seed: int, text: str | None = None,
    answers: Sequence[Sequence[int]] = (),
) -> list[int]:  # fmt: skip
    """`length` token ids whose embeddings a prompt starts at. vocabulary: rows of the model's embedding.

    kind: vocab, text (needs `text`) or labels (needs `answers`: the tokens of each, as they are scored). ValueError
    for another kind, no text, and a prompt longer than the vocabulary.
    """
    if kind == "vocab":
        return vocab_ids(length, tokenizer, vocabulary, seed)
    if kind == "text":
        if not text:
            raise UserError("--prompt_init text needs --init_text 'some words'.")
        return repeat_to_length(text_ids(tokenizer, [text]), length)
    if kind == "labels":
        return label_ids(length, tokenizer, vocabulary, seed, answers)
    raise UserError(f"Unknown prompt initialiser {kind!r}; choose vocab, text or labels.")


def vocab_ids(length: int, tokenizer: Any, vocabulary: int, seed: int) -> list[int]:
    """`length` seeded vocabulary rows: without repetition, no special tokens, none beyond the tokenizer's own."""
    special = set(tokenizer.all_special_ids)
    usable = [token for token in range(min(vocabulary, len(tokenizer))) if token not in special]
    if length > len(usable):
        raise UserError(f"--prompt_length {length} exceeds the {len(usable)} vocabulary rows; use a shorter prompt.")
    order = torch.randperm(len(usable), generator=make_generator(seed, "prompt"))
    return [usable[place] for place in order[:length].tolist()]


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Token ids of the texts, one after the other, without special tokens."""
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def repeat_to_length(ids: list[int], length: int) -> list[int]:
    """The ids repeated and cut to `length`."""
    if not ids:
        raise UserError("The initialisation text has no tokens; give --init_text at least one word.")
    return (ids * (length // len(ids) + 1))[:length]


def label_ids(length: int, tokenizer: Any, vocabulary: int, seed: int, answers: Sequence[Sequence[int]]) -> list[int]:
    """The answers' tokens first, seeded vocabulary rows behind them (Lester et al.: repeat no class word)."""
    end = tokenizer.eos_token_id  # told_apart may have put one behind each answer
    words = [token for answer in answers for token in answer if token != end][:length]
    return words + vocab_ids(length - len(words), tokenizer, vocabulary, seed)
