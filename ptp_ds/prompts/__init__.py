"""Prompts: what is trained. `soft`: P vectors in front of every row's embeddings; `deep`: P keys and values a layer."""

from typing import Any

import torch

from ptp_ds.prompts.deep import DeepPrompt, deep_width
from ptp_ds.prompts.initialise import initial_ids
from ptp_ds.prompts.mlp import PromptMlp, prompt_mlp
from ptp_ds.prompts.soft import SoftPrompt, embedding_width

PROMPTS: dict[str, type[SoftPrompt]] = {"soft": SoftPrompt, "deep": DeepPrompt}


def prompt_width(kind: str, config: Any) -> int:
    """Numbers of one token of a prompt for a model's configuration."""
    return deep_width(config) if kind == "deep" else embedding_width(config)


def empty_prompt(kind: str, length: int, config: Any, mlp: PromptMlp | None, beside: int = 0) -> SoftPrompt:
    """What is trained, all zeros: a prompt of `length` tokens, or the numbers that an MLP makes it from.

    beside: rows behind them that are trained as they are (ptp_ds.models.heads).
    """
    if mlp is not None:
        return PROMPTS[kind](torch.zeros(mlp.flat.rows + beside, mlp.width), mlp.trained_of)
    return PROMPTS[kind](torch.zeros(length + beside, prompt_width(kind, config)))


__all__ = [
    "PROMPTS",
    "DeepPrompt",
    "PromptMlp",
    "SoftPrompt",
    "empty_prompt",
    "initial_ids",
    "prompt_mlp",
    "prompt_width",
]
