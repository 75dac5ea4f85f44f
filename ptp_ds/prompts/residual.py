"""A soft prompt with a residual connection (--prompt_residual; Residual Prompt Tuning, Razdaibiedina et al. 2023).

    prompt = P + up(relu(down(P)))          down: H -> hidden, up: hidden -> H, shared by all of P's vectors

P, `down` and `up` are trained. As published a LayerNorm stands behind `up`, whose output is much longer than a word's
embedding. Here there is none, and `up` starts at zero, so step 0 has the initial prompt to the bit. All of them lie in
the one matrix that training.engine trains (see flat.py). An adapter holds the prompt alone.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ptp_ds.prompts.flat import Flat
from ptp_ds.prompts.mlp import Reparametrised
from ptp_ds.seeding import make_generator


@dataclass(frozen=True)
class ResidualPrompt(Reparametrised):
    """length: P. width: H. hidden: the bottleneck's."""

    length: int
    width: int
    hidden: int

    @cached_property
    def flat(self) -> Flat:
        """prompt [P, H], down [hidden, H] and its bias, up [H, hidden] and its bias, in rows of H."""
        shapes: dict[str, tuple[int, ...]] = {
            "prompt": (self.length, self.width), "down": (self.hidden, self.width), "down_bias": (self.hidden,),
            "up": (self.width, self.hidden), "up_bias": (self.width,),
        }  # fmt: skip
        return Flat(shapes, self.width)

    def _start(self, initial_PW: Tensor, seed: int) -> dict[str, Tensor]:
        generator = make_generator(seed, "prompt residual")
        tensors = {name: torch.zeros(shape) for name, shape in self.flat.shapes.items()}
        tensors["prompt"] = initial_PW
        bound = self.width**-0.5
        for name in ("down", "down_bias"):
            tensors[name].uniform_(-bound, bound, generator=generator)
        return tensors

    def prompt(self, weight_RW: Tensor) -> Tensor:
        """[P, H] in the weight's dtype, with its graph to all rows."""
        parts = self.flat.split(weight_RW.float())
        hidden = torch.relu(F.linear(parts["prompt"], parts["down"], parts["down_bias"]))
        return (parts["prompt"] + F.linear(hidden, parts["up"], parts["up_bias"])).to(weight_RW.dtype)
