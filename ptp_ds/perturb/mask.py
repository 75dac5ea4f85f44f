"""PTP-RN in text space: a seeded share of each row's words replaced by a mask token."""

from collections.abc import Sequence
from typing import Any

import torch

from ptp_ds.errors import UserError
from ptp_ds.perturb.noise import Noise
from ptp_ds.perturb.perturbation import Twin
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example

_NEUTRAL = " _"  # where a tokenizer has no mask token


def mask(examples: Sequence[Example], settings: PerturbSettings, noise: Noise) -> list[Twin]:
    """Each word that may move is masked with probability mask_share, at least one a row, none for a share of 0.

    A token stays a token.
    """
    return [_masked(example, settings, noise) for example in examples]


def _masked(example: Example, settings: PerturbSettings, noise: Noise) -> Twin:
    words = example.words or range(len(example.context_ids))
    free = sorted({word for word, movable in zip(words, example.movable, strict=True) if movable})
    generator = make_generator(noise.seed, "mask", noise.step, example.index)
    draws = torch.rand(len(free) + 1, generator=generator).tolist()
    hidden = {word for word, draw in zip(free, draws, strict=False) if draw < settings.mask_share}
    if free and not hidden and settings.mask_share > 0:
        hidden = {free[int(draws[-1] * len(free))]}
    ids, movable = [], []
    for token, word, moves in zip(example.context_ids, words, example.movable, strict=True):
        masked = moves and word in hidden
        ids.append(settings.mask_id if masked else token)
        movable.append(moves and not masked)
    return Twin(ids, movable)


def mask_token_id(tokenizer: Any, text: str | None) -> int:
    """The token that masks: `text` where it is given, else the tokenizer's own, else a neutral one.

    Raises ValueError where `text` is not one token.
    """
    if text is None and tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    ids = tokenizer(text if text is not None else _NEUTRAL, add_special_tokens=False)["input_ids"]
    if text is not None and len(ids) != 1:
        raise UserError(f"--mask_token {text!r} is {len(ids)} tokens of this model; give one that is a single token.")
    return ids[-1]
