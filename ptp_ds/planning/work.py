"""What is planned for: a cluster, where a ds_config keeps the weights, and what a step works on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ptp_ds.backbone.activations import CHUNK_TOKENS
from ptp_ds.backbone.shapes import ModelShape
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError


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
    tokens in front of them, and what all rows begin with, on each rank. kind: none, noise or ascent, for the tensors
    beside the layers' (_ROWS). sections: micro-batches that the run asks for.
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
    sections: int = 1

    def row(self, world: int) -> int:
        """Tokens of a rank's longest pass: its share of both streams, and the prompt."""
        return -(-self.tokens // world) + self.prefix


def layout_of(name: str, raw: Mapping[str, Any], cluster: Cluster) -> Layout:
    """What a ds_config, as read, does on this cluster."""
    zero = raw["zero_optimization"]
    hpz = zero.get("zero_hpz_partition_size", 1)
    hpz = cluster.gpus if hpz == "auto" else int(hpz)
    offload = zero.get("offload_param", {}).get("device", "none")
    return Layout(name, int(zero["stage"]), hpz if hpz > 1 else 0, bool(zero.get("zero_quantized_weights")), offload)


def load_of(run: RunConfig, shape: ModelShape, size: int, tokens: int, in_rows: bool = False, shared: int = 0) -> Load:
    """A step of this run. in_rows: whether every row holds the prompt (encoders, --target prompt), among its tokens.
    shared: tokens that all rows begin with, which stand behind a soft prompt once and aren't among `tokens`.

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
        prefix=shared + (run.prompt_length if shallow and not in_rows else 0),
        prompt_elements=run.prompt_length * width,
        chunk_tokens=run.chunk_tokens or CHUNK_TOKENS["cuda"],
        kind={"none": "none", "pgd": "ascent"}.get(name, "noise"), sections=run.gradient_accumulation_steps,
    )  # fmt: skip


def population_load(loads: Sequence[Load]) -> Load:
    """A step of several prompts, from each one's own: they share its gathers, and every rank holds all prompts."""
    return replace(
        loads[0], tokens=sum(load.tokens for load in loads), prefix=sum(load.prefix for load in loads),
        prompt_elements=sum(load.prompt_elements for load in loads),
    )  # fmt: skip
