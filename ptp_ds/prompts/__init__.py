"""Prompts: what is trained. `soft`: P vectors in front of every row's embeddings; `deep`: P keys and values a layer."""

from typing import Any

from ptp_ds.prompts.deep import DeepPrompt, deep_width
from ptp_ds.prompts.initialise import initial_prompt
from ptp_ds.prompts.mlp import PromptMlp, prompt_mlp
from ptp_ds.prompts.soft import SoftPrompt

PROMPTS: dict[str, type[SoftPrompt]] = {"soft": SoftPrompt, "deep": DeepPrompt}


def prompt_width(kind: str, config: Any) -> int:
    """Numbers of one token of a prompt for a model's configuration."""
    return deep_width(config) if kind == "deep" else config.get_text_config().hidden_size


__all__ = ["PROMPTS", "DeepPrompt", "PromptMlp", "SoftPrompt", "initial_prompt", "prompt_mlp", "prompt_width"]
