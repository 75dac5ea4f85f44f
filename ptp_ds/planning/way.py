"""Bytes of a step's activations, and how it goes through the layers so that they fit."""

from dataclasses import dataclass, replace

from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.shapes import ModelShape
from ptp_ds.planning.work import Load

# Tensors [N, H] alive at once beside the layers', as measured on small models: with kept layers, at the ends of a step
# that recomputes, and while it works on a chunk. (kind of step, whether norms copy to fp32) -> the three.
_ROWS = {
    ("none", False): (8.0, 3.9, 3.9), ("noise", False): (8.5, 5.9, 4.3), ("ascent", False): (10.0, 8.7, 7.3),
    ("none", True): (16.2, 14.0, 6.1), ("noise", True): (17.1, 14.9, 7.0), ("ascent", True): (19.0, 17.9, 10.0),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """recomputed: the first layers, whose activations are computed again. parts: micro-batches, one after the other
    through all layers (ptp_ds.training.micro_batches)."""

    recomputed: int = 0
    parts: int = 1

    def describe(self, layers: int) -> str:
        """In one word."""
        again = "recompute" if self.recomputed == layers else f"recompute:{self.recomputed}/{layers}"
        if self.parts > 1:
            return f"parts:{self.parts}" + (f",{again}" if self.recomputed else "")
        return again if self.recomputed else "keep"


KEEP = Way()


def layer_bytes(shape: ModelShape, size: int, cuda: bool) -> float:
    """Bytes that one layer keeps for backward, a token.

    Its input and the sum behind attention (2 H), attention's q, k, v and output, and what the feed-forward keeps; no
    product keeps its input. In half precision RMS norms keep fp32 copies and a gate its activation; fp32 has
    ptp_ds.backbone.frozen_ops, but not for experts, each of which keeps its output (H), too. On a CPU each query head
    has keys and values of its own.
    """
    half = size == 2
    stream = 2.0 * shape.width * size
    if half and shape.rms:
        stream = shape.width * size + 2.0 * shape.width * 4
    attention = 2 * shape.queries + 2 * (shape.keys if cuda else shape.queries)
    forward = (3 if half else 2) * shape.inner if shape.gated else shape.inner
    experts = (3 if shape.gated else 1) * shape.routed_inner + shape.routed * shape.width
    return stream + (attention + forward + experts) * size + 4 * shape.heads + 8


def activation_bytes(shape: ModelShape, load: Load, way: Way, world: int, cuda: bool = True) -> float:
    """Most bytes of a step beside weights on one rank.

    Of several parts those of one. A layer that is kept has all of layer_bytes, but for the last one, which works at
    scored positions alone; one that is recomputed has its input, and in its turn one chunk's graph with its gradients,
    when the kept ones behind it are done. All: a few tensors of the row's inputs and outputs.
    """
    if way.parts > 1:
        part = replace(load, tokens=-(-load.tokens // way.parts))
        return activation_bytes(shape, part, Way(way.recomputed), world, cuda)
    tokens, hidden = load.row(world), shape.width * load.size
    per_layer = layer_bytes(shape, load.size, cuda)
    kept, whole, working = _ROWS[load.kind, load.size == 2 and shape.rms]
    before = 0.0
    if way.recomputed < shape.count:
        before = tokens * ((shape.count - 1 - way.recomputed) * per_layer + (way.recomputed + kept) * hidden)
    if not way.recomputed:
        return before
    widths = shape.inner + shape.routed_inner
    inner = (2 if shape.gated else 1) * widths * load.size  # gradients of what a chunk's feed-forward keeps
    chunk = min(tokens, load.chunk_tokens) * (per_layer - 2 * hidden + inner)
    working_bytes = max(tokens * whole * hidden, tokens * working * hidden + chunk)
    return max(before, tokens * way.recomputed * hidden + working_bytes)


def way_of_run(
    shape: ModelShape, load: Load, world: int, wanted: str, room: float, resident: bool, schedule: str,
    cuda: bool = True,
) -> Way:  # fmt: skip
    """How a run with --activations `wanted` goes where kept activations may fill `room` bytes: by its own arithmetic.

    resident: whether each rank has all weights, so that nothing is gathered for a micro-batch. schedule: the flag.
    """
    kept, tokens = activation_bytes(shape, load, KEEP, world, cuda), load.row(world)
    hidden, budget = float(shape.width * load.size), max(0.0, room)
    run = Activations(wanted, bytes_per_token=kept / tokens, input_bytes=hidden, budget_bytes=budget)
    run = run.scheduled(schedule, resident, run.fit)
    rows = tokens - load.prefix
    parts = run.parts(rows, load.prefix, load.sections)
    return Way(run.recomputed(load.prefix - (-rows // parts), shape.count), parts)
