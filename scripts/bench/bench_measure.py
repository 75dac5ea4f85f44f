"""What the benchmarks measure beside time: live memory, the machine's matrix rate, and the floor of a step's work."""

import statistics
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptp_ds.backbone.backbone import Backbone, decoder_layers
from ptp_ds.backbone.frozen_linear import Product, product_for


class PeakMemory(TorchDispatchMode):
    """Peak bytes of the tensors made inside the context and alive at one time; weights don't count. Slows work down."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


@dataclass
class Peak:
    """Most bytes at once. allocated: of tensors, weights too. reserved: what torch's allocator holds, None on a CPU."""

    allocated: int = 0
    reserved: int | None = None


@contextmanager
def peak_of(backbone: Backbone, device: torch.device) -> Iterator[Peak]:
    """The peak of what is done inside, known behind it. On a CPU every operation is watched: don't time it."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.allocated = torch.cuda.max_memory_allocated(device)
        peak.reserved = torch.cuda.max_memory_reserved(device)
        return
    weights = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in weights_of(backbone)}
    with PeakMemory(weights_of(backbone)) as memory:
        yield peak
    peak.allocated = memory.peak + sum(weights.values())


def weights_of(backbone: Backbone) -> list[Tensor]:
    """The storages that were there before a step: whole parameters, or this rank's partitions."""
    parameters: list[Any] = list(backbone.parameters())
    return [getattr(parameter, "ds_tensor", parameter) for parameter in parameters] + list(backbone.buffers())


def matrices_of(backbone: Backbone) -> list[tuple[int, int]]:
    """Shapes of every weight matrix in the decoder layers."""
    parameters: list[Any] = [p for layer in decoder_layers(backbone.model) for p in layer.parameters()]
    shapes = [tuple(getattr(parameter, "ds_shape", parameter.shape)) for parameter in parameters]
    return [shape for shape in shapes if len(shape) == 2]


def matrix_rates(backbone: Backbone, tokens: int, device: torch.device) -> dict[str, float]:
    """Floating-point operations a second of one layer's own products over `tokens` tokens, without anything else.

    torch: by torch's own. fastest: by these, or by the one that frozen layers may have here, whichever is faster.
    """
    own, _ = product_for("auto", device, backbone.dtype)
    torchs = _rate_of(F.linear, backbone, tokens, device)
    fastest = torchs if own is F.linear else max(torchs, _rate_of(own, backbone, tokens, device))
    return {"torch": torchs, "fastest": fastest}


def _rate_of(product: Product, backbone: Backbone, tokens: int, device: torch.device) -> float:
    layers = len(decoder_layers(backbone.model))
    shapes = matrices_of(backbone)[: len(matrices_of(backbone)) // layers]
    weights = [torch.randn(shape, device=device, dtype=backbone.dtype) for shape in shapes]
    inputs = {size: torch.randn(tokens, size, device=device, dtype=backbone.dtype) for _, size in shapes}
    seconds = []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        for weight in weights:
            product(inputs[weight.shape[1]], weight, None)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * tokens * sum(a * b for a, b in shapes) / statistics.median(seconds[2:])


def floor_operations(backbone: Backbone, method: str, ascents: int, prompt: int, tokens: int) -> float:
    """4 N T for each pass with gradient over T real tokens, the prompt's once a step; N weights of the layers."""
    passes = {"none": 1, "gaussian": 2, "uniform": 2, "free": 2, "pgd": ascents + 2}[method]
    return 4.0 * sum(a * b for a, b in matrices_of(backbone)) * (passes * tokens + prompt)


# Dense matrix products in half precision, operations a second, by a part of the card's name; the first that fits.
_CARDS = {
    "B200": 2.25e15, "H100 PCIe": 7.56e14, "H100 NVL": 8.35e14, "H100": 9.89e14, "H200": 9.89e14, "A100": 3.12e14,
    "L40S": 3.62e14, "RTX 4090": 1.65e14,
}  # fmt: skip


def card_rate(device: torch.device) -> float | None:
    """The card's own figure for products in half precision, operations a second: MFU is held against it.

    None on a CPU and for a card that isn't in the table.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _CARDS.items() if part in name), None)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
