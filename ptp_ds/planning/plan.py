"""What a run will need, from the model's configuration alone: memory a rank, bytes moved, operations, time a step.

Memory counts tensors that a rank holds at once (see Memory); tests hold it against measured tensors. Bytes gathered are
those that ptp_ds.backbone.sharding counts, exactly. Seconds are a roofline: the slowest of what goes on side by side.
"""

import itertools
import math
from dataclasses import dataclass, replace

from ptp_ds.backbone.shapes import ModelShape, Shape, elements
from ptp_ds.planning.way import KEEP, Way, activation_bytes, way_of_run
from ptp_ds.planning.work import Cluster, Layout, Load

BOUNDS = ("compute", "interconnect", "memory", "offload")
_SHARE = 0.5  # of the free memory: what ptp_ds.backbone.activations lets kept activations fill


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. shards: weights between steps, hpZ's copy too. gathered: what backbone.sharding holds at most:
    what lies outside the layers and two of them, one of them in its receive buffer. activations: of a step. prompt:
    with its optimizer state. host: in the host's memory, a rank's part."""

    shards: float
    gathered: float
    activations: float
    prompt: float
    host: float

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.shards + self.gathered + self.activations + self.prompt


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One ds_config's plan. memory: with activations as `way` says; activations: bytes of either mode. between_hosts:
    bytes into a host a step. most_tokens: largest --tokens_per_step that fits, 0 for none, of either mode."""

    layout: Layout
    way: Way
    memory: Memory
    activations: dict[str, float]
    fits: bool
    gathered_bytes: int
    reduced_bytes: int
    between_hosts: float
    operations: float
    seconds: dict[str, float]
    most_tokens: dict[str, int]

    @property
    def step_seconds(self) -> float:
        """The roofline: the slowest part."""
        return max(self.seconds.values())

    @property
    def bound(self) -> str:
        """The slowest part's name."""
        return max(BOUNDS, key=lambda name: self.seconds[name])


def shard_elements(shapes: list[Shape], ranks: int) -> int:
    """Elements of one rank's parts of these parameters, each padded to whole parts as DeepSpeed does."""
    return sum(-(-elements([shape]) // ranks) for shape in shapes)


def held_elements(shape: ModelShape) -> int:
    """Most gathered elements at once: what lies outside the layers and two neighbouring ones."""
    sizes = [elements(layer) for layer in shape.layers]
    pairs = [a + b for a, b in itertools.pairwise(sizes)] if len(sizes) == shape.count else []
    return elements(shape.outside_layers) + max(pairs or sizes)


def gathered_bytes(shape: ModelShape, load: Load, layout: Layout) -> int:
    """Bytes of whole parameters that a step gathers, as Traffic.gathered_bytes counts them: each layer `gathers`
    times, all else once; nothing where each rank has all weights."""
    if layout.stage != 3:
        return 0
    again = load.gathers * shape.count // len(shape.layers)
    layers = shape.layer_elements * load.size
    if layout.int8:
        matrices = sum(elements([s]) for layer in shape.layers for s in layer if len(s) > 1)
        layers -= matrices * (load.size - 1)
    return again * layers + elements(shape.outside_layers) * load.size


def reduced_bytes(load: Load, world: int) -> int:
    """Bytes of the prompt's gradient that a step reduces."""
    return 0 if world == 1 else -(-load.prompt_elements // world) * world * load.size


def between_hosts(gathered: int, layout: Layout, cluster: Cluster) -> float:
    """Bytes into a host from the others by ring all-gathers of `gathered` bytes: none where hosts gather alone."""
    if cluster.hosts == 1 or (layout.hpz and cluster.gpus % layout.hpz == 0):
        return 0.0
    return gathered * (cluster.world - 1) / cluster.world


def weights_memory(shape: ModelShape, load: Load, layout: Layout, world: int) -> tuple[float, float, float]:
    """(shards on the device, gathered at most, shards in the host's memory), bytes of one rank."""
    size, everything = load.size, shape.parameters
    if layout.stage != 3:
        return float(shape.elements * size), 0.0, 0.0
    shards = float(shard_elements(everything, world) * size)
    if layout.hpz:
        aligned = [-(-elements([one]) // world) * world for one in everything]
        shards += sum(one // layout.hpz for one in aligned) * size
    outside, largest = elements(shape.outside_layers), max(elements(layer) for layer in shape.layers)
    received = 2.5 if layout.int8 else 2.0  # a layer's weights and the buffer that they came in
    gathered = max(2 * outside, outside + received * largest, held_elements(shape)) * size
    if world == 1 and layout.offload == "none":
        gathered = 0  # one rank's shards are the weights
    if layout.offload == "none":
        return shards, gathered, 0.0
    if layout.offload == "cpu":
        return 0.0, gathered, shards
    buffers = 2 * max(len(layer) for layer in shape.layers) + len(shape.outside_layers)
    return 0.0, gathered, float(buffers * max(-(-elements([one]) // world) for one in everything) * size)


def memory_of(shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, way: Way) -> Memory:
    """Bytes of one rank in a step; see Memory."""
    world = cluster.world
    shards, gathered, host = weights_memory(shape, load, layout, world)
    activations = activation_bytes(shape, load, way, world, cluster.cuda)
    whole, part = load.prompt_elements, -(-load.prompt_elements // world)
    prompt = whole * (2 * load.size + 4) + 3.0 * 4 * part  # a copy, its gradients; the master and two moments in parts
    return Memory(shards, gathered, activations, prompt, host)


def operations_of(shape: ModelShape, load: Load, way: Way, world: int) -> float:
    """Floating-point operations of one rank's step: 4 N a token and pass, 6 where the forward is computed again."""
    stream = load.tokens / world / load.streams
    times = 4.0 + 2.0 * way.recomputed / shape.count
    return times * shape.matrix_elements * (load.passes * stream + way.parts * load.prefix)


def way_of(shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, wanted: str, schedule: str = "auto") -> Way:
    """How the run goes with --activations `wanted`: kept ones of auto may fill half of what the weights leave, as
    backbone.activations decides."""
    shards, _, _ = weights_memory(shape, load, layout, cluster.world)
    room = _SHARE * (cluster.gpu_memory - shards)
    return way_of_run(shape, load, cluster.world, wanted, room, is_resident(layout, cluster), schedule, cluster.cuda)


def is_resident(layout: Layout, cluster: Cluster) -> bool:
    """Whether each rank has all weights."""
    return layout.stage != 3 or (cluster.world == 1 and layout.offload == "none")


def most_tokens(shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, way: Way) -> int:
    """The largest --tokens_per_step whose step fits into a rank's memory; 0 where none does."""

    def fits(share: int) -> bool:
        larger = replace(load, tokens=share * cluster.world)
        return memory_of(shape, larger, layout, cluster, way).total <= cluster.gpu_memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * cluster.world


def seconds_of(
    shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, way: Way, gathered: int
) -> dict[str, float]:
    """Seconds a step of each part, were it alone; gathers, products and copies go on side by side."""
    world = cluster.world
    local = layout.hpz or cluster.gpus
    interconnect = between_hosts(gathered, layout, cluster) / cluster.interconnect
    if local > 1:
        interconnect = max(interconnect, gathered * (local - 1) / local / cluster.local)
    again = 1 + way.recomputed / shape.count
    touched = 3.0 * gathered + 2 * again * activation_bytes(shape, load, KEEP, world, cluster.cuda)
    weights = way.parts * load.gathers * shape.layer_elements * load.size  # read by the products
    copied = gathered / world / cluster.link if layout.offload != "none" else 0.0
    if layout.offload == "nvme":
        copied += gathered / cluster.hosts / cluster.disk  # read, then copied: one layer after the other
    return {
        "compute": operations_of(shape, load, way, world) / cluster.operations,
        "interconnect": interconnect, "memory": (touched + weights) / cluster.memory, "offload": copied,
    }  # fmt: skip


def estimate(
    shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, wanted: str = "auto", schedule: str = "auto"
) -> Estimate:
    """The plan of one ds_config. wanted: --activations; schedule: --schedule."""
    way = way_of(shape, load, layout, cluster, wanted, schedule)
    ends = {name: way_of(shape, load, layout, cluster, name, schedule) for name in ("keep", "recompute")}
    either = {name: memory_of(shape, load, layout, cluster, end) for name, end in ends.items()}
    memory = memory_of(shape, load, layout, cluster, way)
    gathered = gathered_bytes(shape, replace(load, gathers=way.parts * load.gathers), layout)
    return Estimate(
        layout=layout, way=way, memory=memory, activations={name: one.activations for name, one in either.items()},
        fits=memory.total <= cluster.gpu_memory, gathered_bytes=gathered,
        reduced_bytes=reduced_bytes(load, cluster.world), between_hosts=between_hosts(gathered, layout, cluster),
        operations=operations_of(shape, load, way, cluster.world),
        seconds=seconds_of(shape, load, layout, cluster, way, gathered),
        most_tokens={name: most_tokens(shape, load, layout, cluster, end) for name, end in ends.items()},
    )  # fmt: skip


def recommended(estimates: list[Estimate]) -> Estimate | None:
    """The fastest that fits, among those that send exact weights; of nearly equal ones (5 %) the first."""
    exact = [one for one in estimates if one.fits and not one.layout.int8]
    if not exact:
        return None
    least = min(one.step_seconds for one in exact)
    return next(one for one in exact if one.step_seconds <= 1.05 * least or math.isclose(one.step_seconds, least))
