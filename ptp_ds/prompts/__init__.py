"""Prompts: what is trained. `soft` puts P trained vectors in front of every row's embeddings."""

from ptp_ds.prompts.initialise import initial_prompt
from ptp_ds.prompts.soft import SoftPrompt

__all__ = ["SoftPrompt", "initial_prompt"]
