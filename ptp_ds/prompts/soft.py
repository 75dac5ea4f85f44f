"""Soft prompt (Lester et al. 2021): P virtual token embeddings, the only trained parameter."""

import torch
from torch import Tensor, nn


class SoftPrompt(nn.Module):
    """weight [P, H] fp32; under bf16 the engine keeps the fp32 master and casts a working copy."""

    def __init__(self, initial_PH: Tensor) -> None:
        super().__init__()
        self.length = initial_PH.shape[0]  # ZeRO-3 empties the parameter's own shape
        self.weight = nn.Parameter(initial_PH.detach().to(torch.float32).clone())

    def forward(self) -> Tensor:
        """[P, H]. A copy: ZeRO-3 releases the parameter's storage once this module's forward returns."""
        return self.weight.clone()
