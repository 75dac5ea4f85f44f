"""Prompts: what is trained. `soft`: P vectors in front of every row's embeddings; `deep`: P keys and values a layer."""

from typing import Any

from ptp_ds.prompts.deep import DeepPrompt, deep_width
from ptp_ds.prompts.initialise import initial_prompt
from ptp_ds.prompts.soft import SoftPrompt

PROMPTS: dict[str, type[SoftPrompt]] = {"soft": SoftPrompt, "deep": DeepPrompt}


def prompt_width(kind: str, config: Any) -> int:
    """Numbers of one token of a prompt for a model's configuration."""
    return deep_width(config) if kind == "deep" else embedding_width(config)


def embedding_width(config: Any) -> int:
    """H: numbers of a token embedding, which some families project to their layers' width (albert, electra, opt)."""
    text = config.get_text_config()
    own = (getattr(text, name, None) for name in ("embedding_size", "word_embed_proj_dim"))
    return next((width for width in own if width), text.hidden_size)


__all__ = ["PROMPTS", "DeepPrompt", "SoftPrompt", "initial_prompt", "prompt_width"]
