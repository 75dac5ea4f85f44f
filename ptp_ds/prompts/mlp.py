"""A prompt as an MLP's output (--prompt_mlp): what trains is an embedding of the P tokens and the MLP behind it.

    soft   P-tuning (Liu et al. 2021; peft's PromptEncoder)   [P, H] -> Linear ReLU Linear ReLU Linear -> [P, H]
    deep   prefix tuning (Li and Liang 2021; peft's           [P, K d] -> Linear Tanh Linear -> [P, D]
           PrefixEncoder with prefix_projection)

The prompt is base + MLP(embedding). base is the initial prompt; it gets no gradient, and weight decay shrinks it as it
shrinks a plain prompt. The last layer starts at zero, so step 0 has the initial prompt to the bit. All tensors, base
too, lie in the one matrix that training.engine trains and saves (see flat.py): a resumed run has each of them exactly.
The MLP is computed in fp32 and is needed in training alone: an adapter holds the prompt.
"""

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptp_ds.prompts.deep import deep_shape, deep_width
from ptp_ds.prompts.flat import Flat
from ptp_ds.prompts.soft import embedding_width
from ptp_ds.seeding import make_generator

_LAYERS = {"soft": 3, "deep": 2}
_ACTIVATION = {"soft": torch.relu, "deep": torch.tanh}


class Reparametrised(ABC):
    """What is trained in the place of a prompt [P, W], in rows of W. length: P. width: W."""

    length: int
    width: int

    @property
    @abstractmethod
    def flat(self) -> Flat:
        """The tensors that are trained, and their layout."""

    @abstractmethod
    def _start(self, initial_PW: Tensor, seed: int) -> dict[str, Tensor]:
        """Those tensors, fp32 on the CPU, such that `prompt` gives the initial one, to the bit."""

    @abstractmethod
    def prompt(self, weight_RW: Tensor) -> Tensor:
        """[P, W] in the weight's dtype, with its graph."""

    def start(self, initial_PW: Tensor, seed: int) -> Tensor:
        """[R, W] fp32 on the CPU: numbers whose prompt is the initial one. Rows behind its P stay as they are."""
        initial_PW, beside = initial_PW.detach().float().cpu().split([self.length, initial_PW.shape[0] - self.length])
        return torch.cat([self.flat.pack(self._start(initial_PW, seed)), beside])

    def trained_of(self, weight_RW: Tensor) -> Tensor:
        """All that is trained: the prompt [P, W], and the rows behind the layout's as they are."""
        own, beside = weight_RW.split([self.flat.rows, weight_RW.shape[0] - self.flat.rows])
        return torch.cat([self.prompt(own), beside])


@dataclass(frozen=True)
class PromptMlp(Reparametrised):
    """kind: soft or deep. length: P. width: W of the prompt, H or D. embedding: the MLP's inputs. hidden: its width."""

    kind: str
    length: int
    width: int
    embedding: int
    hidden: int

    @cached_property
    def flat(self) -> Flat:
        """base [P, W], embedding [P, E], then each layer's weight [out, in] and bias [out], in rows of W."""
        shapes: dict[str, tuple[int, ...]] = {
            "base": (self.length, self.width), "embedding": (self.length, self.embedding),
        }  # fmt: skip
        ends = [self.embedding, *[self.hidden] * (_LAYERS[self.kind] - 1), self.width]
        for layer, (inner, outer) in enumerate(itertools.pairwise(ends)):
            shapes |= {f"weight{layer}": (outer, inner), f"bias{layer}": (outer,)}
        return Flat(shapes, self.width)

    def _start(self, initial_PW: Tensor, seed: int) -> dict[str, Tensor]:
        """The base is the initial prompt, the last layer zero; torch's own initialisation elsewhere."""
        generator = make_generator(seed, "prompt mlp")
        tensors = {name: torch.zeros(shape) for name, shape in self.flat.shapes.items()}
        tensors["base"] = initial_PW
        tensors["embedding"].normal_(generator=generator)
        for layer in range(_LAYERS[self.kind] - 1):
            bound = tensors[f"weight{layer}"].shape[1] ** -0.5
            tensors[f"weight{layer}"].uniform_(-bound, bound, generator=generator)
            tensors[f"bias{layer}"].uniform_(-bound, bound, generator=generator)
        return tensors

    def prompt(self, weight_RW: Tensor) -> Tensor:
        """[P, W] in the weight's dtype, with its graph to all rows but base's."""
        parts = self.flat.split(weight_RW.float())
        hidden, last = parts["embedding"], _LAYERS[self.kind] - 1
        for layer in range(last):
            hidden = _ACTIVATION[self.kind](F.linear(hidden, parts[f"weight{layer}"], parts[f"bias{layer}"]))
        output = F.linear(hidden, parts[f"weight{last}"], parts[f"bias{last}"])
        return (parts["base"].detach() + output).to(weight_RW.dtype)


def prompt_mlp(kind: str, length: int, hidden: int | None, config: Any) -> PromptMlp | None:
    """The MLP of --prompt_mlp for a model's configuration; None without a hidden width."""
    if hidden is None:
        return None
    if kind == "deep":
        _, heads, width = deep_shape(config)
        return PromptMlp(kind, length, deep_width(config), heads * width, hidden)
    width = embedding_width(config)
    return PromptMlp(kind, length, width, width, hidden)
