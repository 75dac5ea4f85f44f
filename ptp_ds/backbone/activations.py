"""Whether layers keep their activations for backward or compute them again, and how many tokens they take at a time."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}  # a device's; a GPU's products want more at once
_SHARE = 0.5  # of the memory that is free at the start: kept activations may fill so much


@dataclass(frozen=True)
class Activations:
    """keep: every layer's graph stays until its backward. recompute: its input alone, L x T x H numbers in all, and one
    chunk's graph at a time, for about 1.4 times the work. auto: keep what fits, the last layers first, since their
    backward comes first and makes room for the others'.

    chunk_tokens: tokens that a layer handles at a time (whole rows, at least one). bytes_per_token: what keeping costs,
    all layers together; input_bytes: one layer's input alone. budget_bytes: what it may cost.

    schedule: see ptp_ds.training.micro_batches; most_tokens: those of a micro-batch, where it isn't breadth.
    """

    mode: str = "keep"
    chunk_tokens: int = 2048
    bytes_per_token: float = 0.0
    input_bytes: float = 0.0
    budget_bytes: float = float("inf")
    schedule: str = "breadth"
    most_tokens: int | None = None

    def recomputed(self, tokens: int, layers: int) -> int:
        """How many of `layers`, the first ones, are computed again in a step over `tokens` tokens, prompt and both
        streams."""
        if self.mode != "auto":
            return layers if self.mode == "recompute" else 0
        return layers - kept_layers(tokens, layers, self.bytes_per_token, self.input_bytes, self.budget_bytes)

    @property
    def fit(self) -> int:
        """Tokens whose activations fit into the budget; 0 where it or what a token costs isn't known."""
        known = self.bytes_per_token > 0 and math.isfinite(self.budget_bytes)
        return int(self.budget_bytes / self.bytes_per_token) if known else 0

    def parts(self, tokens: int, prefix: int, sections: int) -> int:
        """Micro-batches that a step over `tokens` tokens, both streams, takes one after the other.

        prefix: tokens that each of them begins with. sections: those that the user asked for, which breadth takes side
        by side.
        """
        if self.schedule == "breadth":
            return 1
        needed, room = 1, self.most_tokens - prefix if self.most_tokens is not None else 0
        if room > 0 and tokens > room:
            needed = -(-tokens // room)
        return max(needed, sections) if needed > 1 or self.schedule == "depth" else 1

    def scheduled(self, wanted: str, resident: bool, fit: int, before: int | None = None) -> "Activations":
        """The same with --schedule `wanted`. resident: whether each rank has all weights, so that no gather is made for
        a micro-batch. fit: tokens whose activations fit on every rank; before: most_tokens of the run's first part.
        """
        if wanted == "breadth" or (wanted == "auto" and not resident):
            return replace(self, schedule="breadth")
        most = None
        if self.mode == "auto" and fit:
            most = 1 << max(0, fit.bit_length() - 1)  # a power of two, which a little memory more or less leaves alone
            most = before if before is not None and before <= most else most
        return replace(self, schedule=wanted, most_tokens=most)

    def describe(self) -> str:
        """One line for the run's start."""
        if self.mode != "auto" or not self.fit:
            depth = ", micro-batches one after the other (depth first)" if self.schedule == "depth" else ""
            return f"{self.mode}{depth}"
        beyond = "recompute layers until the rest fits"
        if self.most_tokens is not None:
            beyond = f"micro-batches of up to {self.most_tokens}, one after the other (depth first)"
        return (
            f"keep up to {self.fit} tokens a step ({self.bytes_per_token / 2**20:.2f} MiB each of "
            f"{self.budget_bytes / 2**30:.1f} GiB), else {beyond}"
        )


def kept_layers(tokens: float, layers: int, bytes_per_token: float, input_bytes: float, budget: float) -> int:
    """How many of `layers` can keep their activations within `budget` bytes; of the others the input is kept.

    bytes_per_token: of all layers, kept; input_bytes: a layer's input.
    """
    if tokens * bytes_per_token <= budget:
        return layers
    more = tokens * (bytes_per_token / layers - input_bytes)  # what keeping one layer more costs
    left = budget - tokens * layers * input_bytes
    return max(0, min(layers - 1, int(left / more))) if more > 0 else 0


def activations_on(device: torch.device, mode: str, chunk_tokens: int | None = None) -> Activations:
    """Activations within this rank's memory_budget; chunk_tokens: None for the device's own."""
    chunk = chunk_tokens or CHUNK_TOKENS[device.type]
    return Activations(mode, chunk, budget_bytes=memory_budget(device))


class SavedBytes:
    """Counts what autograd saves inside `counting`: each storage once, parameters left out."""

    def __init__(self, parameters: Iterator[Tensor]) -> None:
        self._known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.total = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Every tensor that is saved for backward inside is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known and not isinstance(tensor, torch.nn.Parameter):
            self._known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def memory_budget(device: torch.device) -> float:
    """Bytes that kept activations may take on this rank: half of what is free now, shared out among a host's ranks."""
    if device.type == "cuda":
        return _SHARE * torch.cuda.mem_get_info(device)[0]
    import psutil

    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE", "1"))
    return _SHARE * psutil.virtual_memory().available / max(1, here)
