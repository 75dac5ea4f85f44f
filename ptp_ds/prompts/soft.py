"""Soft prompt (Lester et al. 2021): P virtual token embeddings, the only trained parameter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def embedding_width(config: Any) -> int:
    """H: numbers of a token embedding, which some families project to their layers' width."""
    text = config.get_text_config()
    names = ("embedding_size", "input_embedding_size", "word_embed_proj_dim")  # electra's, rembert's, opt's
    own = (getattr(text, name, None) for name in names)
    return next((width for width in own if width), text.hidden_size)


class SoftPrompt(nn.Module):
    """weight [R, W] fp32; under bf16 the engine keeps the fp32 master and casts a working copy.

    trained_of: [R, W] -> the prompt [P, W], for a weight that isn't the prompt itself.
    """

    def __init__(self, weight_RW: Tensor, trained_of: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_RW.detach().to(torch.float32).clone())
        self._trained_of = trained_of

    def trained_of(self, weight_RW: Tensor) -> Tensor:
        """[P, W] the prompt that a weight stands for."""
        return weight_RW if self._trained_of is None else self._trained_of(weight_RW)

    def forward(self) -> Tensor:
        """[P, W]. From a copy: ZeRO-3 releases the parameter's storage once this module's forward returns."""
        return self.trained_of(self.weight.clone())
