"""Prompts: what is trained. `soft`: P vectors in front of every row's embeddings; `deep`: P keys and values a layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptp_ds.prompts.deep import DeepPrompt, deep_width
from ptp_ds.prompts.initialise import initial_ids
from ptp_ds.prompts.mlp import PromptMlp, Reparametrised, prompt_mlp
from ptp_ds.prompts.residual import ResidualPrompt
from ptp_ds.prompts.soft import SoftPrompt, embedding_width

PROMPTS: dict[str, type[SoftPrompt]] = {"soft": SoftPrompt, "deep": DeepPrompt}


def prompt_width(kind: str, config: Any) -> int:
    """Numbers of one token of a prompt for a model's configuration."""
    return deep_width(config) if kind == "deep" else embedding_width(config)


def reparametrised(
    kind: str, length: int, config: Any, mlp: int | None = None, residual: int | None = None
) -> Reparametrised | None:
    """What is trained in the place of a prompt; None where it is the prompt itself. mlp, residual: hidden widths."""
    if residual is not None:
        return ResidualPrompt(length, prompt_width(kind, config), residual)
    return prompt_mlp(kind, length, mlp, config)


def empty_prompts(
    kind: str, config: Any, lengths: Sequence[int], made: Sequence[Reparametrised | None], beside: int = 0
) -> tuple[SoftPrompt, list[int]]:
    """(what is trained, all zeros: prompts of these lengths, or what each is made from, one behind the other; each
    one's rows in it). beside: rows behind each that are trained as they are (ptp_ds.models.heads).
    """
    rows = [length if one is None else one.flat.rows for length, one in zip(lengths, made, strict=True)]
    rows = [own + beside for own in rows]

    def trained_of(weight_RW: Tensor) -> Tensor:
        parts = weight_RW.split(rows)
        return torch.cat([part if one is None else one.trained_of(part) for part, one in zip(parts, made, strict=True)])

    weight = torch.zeros(sum(rows), prompt_width(kind, config))
    return PROMPTS[kind](weight, trained_of if any(one is not None for one in made) else None), rows


__all__ = [
    "PROMPTS",
    "DeepPrompt",
    "PromptMlp",
    "Reparametrised",
    "ResidualPrompt",
    "SoftPrompt",
    "empty_prompts",
    "initial_ids",
    "prompt_mlp",
    "prompt_width",
    "reparametrised",
]
