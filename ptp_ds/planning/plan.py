"""What a run will need, from the model's configuration alone: memory a rank, bytes moved, operations, time a step.

Memory counts tensors that a rank holds at once (see Memory); tests hold it against measured tensors. Bytes gathered are
those that ptp_ds.backbone.sharding counts, exactly. Seconds are a roofline: the slowest of what goes on side by side.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptp_ds.backbone.shapes import ModelShape, Shape, elements
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError

BOUNDS = ("compute", "interconnect", "memory", "offload")
# Tensors [N, H] alive at once beside the layers', as measured on small models: with kept layers, at the ends of a step
# that recomputes, and while it works on a chunk. (kind of step, whether norms copy to fp32) -> the three.
_ROWS = {
    ("none", False): (8.0, 3.9, 3.9), ("noise", False): (8.5, 5.9, 4.3), ("ascent", False): (10.0, 8.7, 7.3),
    ("none", True): (16.2, 14.0, 6.1), ("noise", True): (17.1, 14.9, 7.0), ("ascent", True): (19.0, 17.9, 10.0),
}  # fmt: skip
_SHARE = 0.5  # of the free memory: what ptp_ds.backbone.activations lets kept activations fill


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """hosts of `gpus` ranks each. gpu_memory: bytes a rank may use. Rates are in bytes a second: interconnect into a
    host from the others, local into a GPU from its own host's, memory of a GPU, link from a host's memory to a GPU,
    disk of a host; operations: floating-point operations a second that a GPU's matrix products reach.
    """

    hosts: int
    gpus: int
    gpu_memory: float
    interconnect: float
    local: float
    memory: float
    link: float
    disk: float
    operations: float
    cuda: bool = True

    @property
    def world(self) -> int:
        """Ranks of the run."""
        return self.hosts * self.gpus


@dataclass(frozen=True)
class Layout:
    """Where a ds_config keeps the weights. hpz: ranks that gather among themselves, 0 for all. int8: whether layers'
    matrices are sent so. offload: none, cpu or nvme."""

    name: str
    stage: int
    hpz: int = 0
    int8: bool = False
    offload: str = "none"


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step works on. size: bytes of a number. passes: through the layers with gradient, over `streams` streams
    or one. gathers: of each layer. tokens: packed tokens of a step over all ranks and streams; prefix: a soft prompt's
    tokens in front of them, on each rank. kind: none, noise or ascent, for the tensors beside the layers' (_ROWS).
    """

    size: int
    streams: int
    passes: float
    gathers: int
    tokens: int
    prefix: int
    prompt_elements: int
    chunk_tokens: int
    kind: str

    def row(self, world: int) -> int:
        """Tokens of a rank's longest pass: its share of both streams, and the prompt."""
        return -(-self.tokens // world) + self.prefix


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
    """One ds_config's plan. memory: with activations as `mode` says; activations: bytes of either mode. between_hosts:
    bytes into a host a step. most_tokens: largest --tokens_per_step that fits, 0 for none, of either mode."""

    layout: Layout
    mode: str
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


def layout_of(name: str, raw: Mapping[str, Any], cluster: Cluster) -> Layout:
    """What a ds_config, as read, does on this cluster."""
    zero = raw["zero_optimization"]
    hpz = zero.get("zero_hpz_partition_size", 1)
    hpz = cluster.gpus if hpz == "auto" else int(hpz)
    offload = zero.get("offload_param", {}).get("device", "none")
    return Layout(name, int(zero["stage"]), hpz if hpz > 1 else 0, bool(zero.get("zero_quantized_weights")), offload)


def load_of(run: RunConfig, shape: ModelShape, size: int, tokens: int, in_rows: bool = False) -> Load:
    """A step of this run. in_rows: whether every row holds the prompt (encoders, --target prompt), among its tokens.

    Raises ValueError for a perturbation of the user's own: how often it passes through the layers isn't known.
    """
    known = {"none": (1.0, 1), "pgd": (run.ascent_steps + 2.0, run.ascent_steps + 1), "a2t": (4.0, 3)}
    perturbation, name = run.active_perturbation, run.perturbation if run.perturbs else "none"
    if name.endswith(".py"):
        raise UserError(f"--perturbation {name}: can't be planned for; take a built-in one that works alike.")
    passes, visits = known.get(
        "a2t" if perturbation is not None and perturbation.attack is not None else name, (2.0, 1)
    )
    shallow = run.prompt == "soft"
    width = shape.width if shallow else 2 * shape.count * shape.keys
    return Load(
        size=size, streams=run.streams, passes=passes, gathers=2 * visits, tokens=tokens,
        prefix=run.prompt_length if shallow and not in_rows else 0, prompt_elements=run.prompt_length * width,
        chunk_tokens=run.chunk_tokens, kind={"none": "none", "pgd": "ascent"}.get(name, "noise"),
    )  # fmt: skip


def population_load(loads: Sequence[Load]) -> Load:
    """A step of several prompts, from each one's own: they share its gathers, and every rank holds all prompts."""
    return replace(
        loads[0], tokens=sum(load.tokens for load in loads), prefix=sum(load.prefix for load in loads),
        prompt_elements=sum(load.prompt_elements for load in loads),
    )  # fmt: skip


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


def layer_bytes(shape: ModelShape, size: int, cuda: bool) -> float:
    """Bytes that one layer keeps for backward, a token.

    Its input and the sum behind attention (2 H), attention's q, k, v and output, and what the feed-forward keeps; no
    product keeps its input. In half precision RMS norms keep fp32 copies and a gate its activation; fp32 has
    ptp_ds.backbone.frozen_ops. On a CPU each query head has keys and values of its own.
    """
    half = size == 2
    stream = 2.0 * shape.width * size
    if half and shape.rms:
        stream = shape.width * size + 2.0 * shape.width * 4
    attention = 2 * shape.queries + 2 * (shape.keys if cuda else shape.queries)
    forward = (3 if half else 2) * shape.inner if shape.gated else shape.inner
    return stream + (attention + forward) * size + 4 * shape.heads + 8


def activation_bytes(shape: ModelShape, load: Load, mode: str, world: int, cuda: bool = True) -> float:
    """Most bytes of a step beside weights on one rank, for keep or recompute.

    keep: every layer's (layer_bytes) but the last one's, which works at scored positions alone. recompute: every
    layer's input, and one chunk's graph with its gradients. Both: a few tensors of the row's inputs and outputs.
    """
    tokens, hidden = load.row(world), shape.width * load.size
    per_layer = layer_bytes(shape, load.size, cuda)
    kept, whole, working = _ROWS[load.kind, load.size == 2 and shape.rms]
    if mode == "keep":
        return tokens * ((shape.count - 1) * per_layer + kept * hidden)
    inner = (2 if shape.gated else 1) * shape.inner * load.size  # gradients of what a chunk's feed-forward keeps
    chunk = min(tokens, load.chunk_tokens) * (per_layer - 2 * hidden + inner)
    return tokens * shape.count * hidden + max(tokens * whole * hidden, tokens * working * hidden + chunk)


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


def memory_of(shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, mode: str) -> Memory:
    """Bytes of one rank in a step; see Memory."""
    world = cluster.world
    shards, gathered, host = weights_memory(shape, load, layout, world)
    activations = activation_bytes(shape, load, mode, world, cluster.cuda)
    whole, part = load.prompt_elements, -(-load.prompt_elements // world)
    prompt = whole * (2 * load.size + 4) + 3.0 * 4 * part  # a copy, its gradients; the master and two moments in parts
    return Memory(shards, gathered, activations, prompt, host)


def operations_of(shape: ModelShape, load: Load, mode: str, world: int) -> float:
    """Floating-point operations of one rank's step: 4 N a token and pass, 6 where the forward is computed again."""
    stream = load.tokens / world / load.streams
    return (4.0 if mode == "keep" else 6.0) * shape.matrix_elements * (load.passes * stream + load.prefix)


def mode_of(shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, wanted: str) -> str:
    """keep or recompute; auto as backbone.activations decides: kept ones may fill half of what the weights leave."""
    if wanted != "auto":
        return wanted
    shards, _, _ = weights_memory(shape, load, layout, cluster.world)
    kept = activation_bytes(shape, load, "keep", cluster.world, cluster.cuda)
    fits = memory_of(shape, load, layout, cluster, "keep").total <= cluster.gpu_memory
    return "keep" if fits and kept <= _SHARE * (cluster.gpu_memory - shards) else "recompute"


def most_tokens(shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, mode: str) -> int:
    """The largest --tokens_per_step whose step fits into a rank's memory; 0 where none does."""

    def fits(share: int) -> bool:
        larger = replace(load, tokens=share * cluster.world)
        return memory_of(shape, larger, layout, cluster, mode).total <= cluster.gpu_memory

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
    shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, mode: str, gathered: int
) -> dict[str, float]:
    """Seconds a step of each part, were it alone; gathers, products and copies go on side by side."""
    world = cluster.world
    local = layout.hpz or cluster.gpus
    interconnect = between_hosts(gathered, layout, cluster) / cluster.interconnect
    if local > 1:
        interconnect = max(interconnect, gathered * (local - 1) / local / cluster.local)
    again = 1 + (mode == "recompute")
    touched = 3.0 * gathered + 2 * again * activation_bytes(shape, load, "keep", world, cluster.cuda)
    weights = load.gathers * shape.layer_elements * load.size  # read by the products
    copied = gathered / world / cluster.link if layout.offload != "none" else 0.0
    if layout.offload == "nvme":
        copied = max(copied, gathered / cluster.hosts / cluster.disk)
    return {
        "compute": operations_of(shape, load, mode, world) / cluster.operations,
        "interconnect": interconnect, "memory": (touched + weights) / cluster.memory, "offload": copied,
    }  # fmt: skip


def estimate(shape: ModelShape, load: Load, layout: Layout, cluster: Cluster, wanted: str = "auto") -> Estimate:
    """The plan of one ds_config. wanted: --activations."""
    mode = mode_of(shape, load, layout, cluster, wanted)
    either = {way: memory_of(shape, load, layout, cluster, way) for way in ("keep", "recompute")}
    memory, gathered = either[mode], gathered_bytes(shape, load, layout)
    return Estimate(
        layout=layout, mode=mode, memory=memory, activations={way: one.activations for way, one in either.items()},
        fits=memory.total <= cluster.gpu_memory, gathered_bytes=gathered,
        reduced_bytes=reduced_bytes(load, cluster.world), between_hosts=between_hosts(gathered, layout, cluster),
        operations=operations_of(shape, load, mode, cluster.world),
        seconds=seconds_of(shape, load, layout, cluster, mode, gathered),
        most_tokens={way: most_tokens(shape, load, layout, cluster, way) for way in either},
    )  # fmt: skip


def recommended(estimates: list[Estimate]) -> Estimate | None:
    """The fastest that fits, among those that send exact weights; of nearly equal ones (5 %) the first."""
    exact = [one for one in estimates if one.fits and not one.layout.int8]
    if not exact:
        return None
    least = min(one.step_seconds for one in exact)
    return next(one for one in exact if one.step_seconds <= 1.05 * least or math.isclose(one.step_seconds, least))
