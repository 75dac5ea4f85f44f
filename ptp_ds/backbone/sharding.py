"""A sharded backbone's weights, gathered layer by layer: once where a layer works, the next one's in flight.

DeepSpeed's own partitions and collectives are used (ZeRO-3, hpZ's secondary shards, parameter offload), or memory that
a host's ranks share (backbone.host_shards), not its module hooks: a hook gathers a layer at every call and can't know
that the same layer works on both streams, on all rows and micro-batches. Without ZeRO-3 everything here does nothing.

Collectives have a stream of their own, so the next layer's begins before this one's work. A copy from the host's
memory, or from disk, waits for what the device was given before, or blocks the host: it begins behind this one's
launch, on a second stream, and so goes on beside the work.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ptp_ds.backbone.host_shards import hide_wholes, share_on_host, show_wholes
from ptp_ds.ranks.distributed import Ranks

OUTSIDE_LAYERS = -1  # everything outside the layers: embeddings, final norm, head


@dataclass(frozen=True)
class ResolvedDeepSpeed:
    """config: what DeepSpeed gets. notes: one line for each resolved "auto". dtype: the backbone's."""

    config: dict[str, Any]
    notes: list[str]
    dtype: torch.dtype

    @property
    def stage(self) -> int:
        return int(self.config["zero_optimization"]["stage"])


@dataclass
class Traffic:
    """What was gathered since `reset`: calls for each layer (OUTSIDE_LAYERS: the rest), bytes, and the most held at
    once.

    gathered_bytes: of whole parameters as they are sent, int8's scales left out (at most 4 bytes for 2000 numbers); 0
    for those that lie in shared memory.
    """

    gathers: dict[int, int] = field(default_factory=dict)
    gathered_bytes: int = 0
    held_elements: int = 0
    peak_elements: int = 0
    peak_layers: int = 0

    def reset(self) -> None:
        """Starts counting again; what is held stays counted as held."""
        self.gathers, self.gathered_bytes = {}, 0
        self.peak_elements, self.peak_layers = self.held_elements, 0


class Shards:
    """Gathers and releases the partitions of `layers` and of the rest of `root`.

    All ranks must enter the same contexts in the same order, since every gather is a collective.
    """

    def __init__(self, layers: Sequence[nn.Module], root: nn.Module) -> None:
        self._root, self.shared = root, False  # shared: weights lie whole in memory, one for all ranks of this host
        in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
        self._groups: dict[int, list[Any]] = {
            number: _sharded(layer.parameters()) for number, layer in enumerate(layers)
        }
        self._groups[OUTSIDE_LAYERS] = _sharded(p for p in root.parameters() if id(p) not in in_layers)
        self._handles: dict[int, list[Any]] = {}
        self.offloaded = any(_is_elsewhere(p) for group in self._groups.values() for p in group)
        self._copies = torch.cuda.Stream() if self.offloaded and torch.cuda.is_available() else None
        self._outside_users = 0
        self.traffic = Traffic()

    @property
    def sharded(self) -> bool:
        """Whether there is anything to gather."""
        return any(self._groups.values())

    def share(self, ranks: Ranks) -> None:
        """Puts the shards into memory that all ranks share, where they are on one host; all ranks must call it."""
        self.shared = share_on_host(self._root, ranks)

    @contextmanager
    def layer(self, number: int, following: int | None = None) -> Iterator[None]:
        """Layer `number` whole inside; the gather of layer `following` goes on beside the work."""
        self._start(number)
        self._wait(number)
        ahead = [following] if following is not None and following in self._groups else []
        for other in ahead if not self.offloaded else ():
            self._start(other)
        try:
            yield
            for other in ahead if self.offloaded else ():
                self._start(other)
        finally:
            self._release(number)

    @contextmanager
    def outside_layers(self) -> Iterator[None]:
        """Embeddings, final norm and head whole inside; contexts may nest, the outermost one gathers."""
        if self._outside_users == 0:
            self._start(OUTSIDE_LAYERS)
            self._wait(OUTSIDE_LAYERS)
        self._outside_users += 1
        try:
            yield
        finally:
            self._outside_users -= 1
            if self._outside_users == 0:
                self._release(OUTSIDE_LAYERS)

    def _start(self, number: int) -> None:
        parameters = self._groups[number]
        if not parameters or number in self._handles:
            return
        traffic, size = self.traffic, sum(parameter.ds_numel for parameter in parameters)
        if self.shared:
            show_wholes(parameters)
            self._handles[number] = []
        else:
            exact = [parameter for parameter in parameters if not sent_as_int8(parameter)]
            rough = [parameter for parameter in parameters if sent_as_int8(parameter)]
            with torch.cuda.stream(self._copies):  # as it is without one
                self._handles[number] = [
                    part[0].all_gather_coalesced(part, quantize=part is rough) for part in (exact, rough) if part
                ]
            traffic.gathered_bytes += sum(p.ds_numel * p.element_size() for p in exact) + sum(p.ds_numel for p in rough)
        traffic.gathers[number] = traffic.gathers.get(number, 0) + 1
        traffic.held_elements += size
        traffic.peak_elements = max(traffic.peak_elements, traffic.held_elements)
        traffic.peak_layers = max(traffic.peak_layers, sum(held != OUTSIDE_LAYERS for held in self._handles))

    def _wait(self, number: int) -> None:
        with torch.cuda.stream(self._copies):
            for handle in self._handles.get(number, ()):
                handle.wait()
        if self._copies is not None and number in self._handles:
            torch.cuda.current_stream().wait_stream(self._copies)
        if number in self._handles:
            self._handles[number] = []  # a handle keeps the buffer that the weights were received in

    def _release(self, number: int) -> None:
        if number not in self._handles:
            return
        del self._handles[number]
        parameters = self._groups[number]
        if self.shared:
            hide_wholes(parameters)
        else:
            parameters[0].partition(parameters)
        self.traffic.held_elements -= sum(parameter.ds_numel for parameter in parameters)


def _is_elsewhere(parameter: Any) -> bool:
    """Whether a shard lies on disk, or in the host's memory and not where it is used."""
    from deepspeed.accelerator import get_accelerator

    shard = parameter.ds_tensor
    on_disk = getattr(shard, "final_location", None) == "nvme"
    return on_disk or shard.device.type != get_accelerator().device_name()


def _sharded(parameters: Any) -> list[Any]:
    """Each parameter that ZeRO-3 has partitioned, once, in order."""
    found: dict[int, Any] = {id(p): p for p in parameters if hasattr(p, "ds_tensor")}
    return list(found.values())


def send_as_int8(layers: Sequence[nn.Module]) -> None:
    """From now on the layers' matrices are gathered as int8, quantised by DeepSpeed on the way; vectors stay exact."""
    for layer in layers:
        parameter: Any
        for parameter in layer.parameters():
            if hasattr(parameter, "ds_tensor") and len(parameter.ds_shape) > 1:
                parameter.ptp_int8 = True


def sent_as_int8(parameter: Any) -> bool:
    """Whether a gather of this parameter sends int8."""
    return getattr(parameter, "ptp_int8", False)
