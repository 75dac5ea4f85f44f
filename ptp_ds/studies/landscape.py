"""Loss landscapes around trained prompts: mean cross-entropy of rows over planes, and numbers that sum a plane up.

Two spaces. Inputs: a delta on the rows' movable embeddings, which a perturbation climbs in training; X is the gradient
direction, Y a random one orthogonal to it, each of norm 1 in every example, as pgd's Frobenius ball has it. Prompt: two
random directions, each virtual token's scaled to that token's norm (filter normalisation, Li et al. 2018).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.kernels.perturb_step import example_norm
from ptp_ds.objective import cross_entropy_sum, log_probabilities
from ptp_ds.packing.layouts import Rows
from ptp_ds.packing.row import PackedRow
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import Questions, score_prompts, serve_rows

_AT_ONCE = 64  # prompts of the prompt's plane that are scored together
_NODES = (9, 17)  # of an axis; the first one's points are among the second one's
_CHECKS = 12  # points at which an interpolation is tried
_ROUNDS = 10  # of power iteration
_STEP = 0.02  # mean embedding norms, half of the distance between two gradients

Means = Callable[[Sequence[tuple[float, float]]], list[float]]  # mean cross-entropies at points (x, y)


@dataclass(frozen=True)
class Subject:
    """A prompt to look at. trained: it and its head's rows, if any. rows: how it lays the examples out."""

    name: str
    trained: Tensor
    rows: Rows


@dataclass(frozen=True)
class Plane:
    """values [Y, X]: mean cross-entropy in nats at (xs, ys).

    computed: points at which it was computed. error: where the others are interpolated, the largest distance of the
    interpolation from computed values at points that it had not seen, in nats; 0 where all are computed.
    """

    xs: np.ndarray
    ys: np.ndarray
    values: np.ndarray
    computed: int = 0
    error: float = 0.0

    @property
    def centre(self) -> float:
        """The value at the point nearest to (0, 0)."""
        return float(self.values[np.abs(self.ys).argmin(), np.abs(self.xs).argmin()])

    def rise(self, radius: float) -> tuple[float | None, float | None]:
        """(largest, mean) rise above the centre over the points within `radius` of it, the centre among them; None
        where it alone is, since nothing is known between points.
        """
        near = np.hypot(*np.meshgrid(self.xs, self.ys)) <= radius * (1 + 1e-9)
        if near.sum() < 2:
            return None, None
        above = self.values[near] - self.centre
        return float(above.max()), float(above.mean())

    def slope(self) -> float:
        """The largest slope in nats a unit, by central differences: over two steps of the grid, so that a cliff between
        two points is told as up to half as steep.
        """
        down, across = np.gradient(self.values, self.ys, self.xs)
        return float(np.hypot(down, across).max())

    def summary(self, radii: Sequence[float]) -> dict[str, object]:
        """Numbers for a table: rises by radius, the largest slope, the centre."""
        rises = {f"{radius:g}": self.rise(radius) for radius in radii}
        return {
            "centre": self.centre, "computed": self.computed, "error": self.error,
            "largest_rise": {name: rise[0] for name, rise in rises.items()},
            "mean_rise": {name: rise[1] for name, rise in rises.items()}, "largest_slope": self.slope(),
        }  # fmt: skip


def _batched(values: Iterable[Any], most: int) -> Iterator[list[Any]]:
    """Runs of up to `most` values (itertools.batched is Python 3.12's)."""
    left = iter(values)
    while some := list(islice(left, most)):
        yield some


def axis(radius: float, points: int) -> np.ndarray:
    """`points` values from -radius to radius, 0 among them (an odd number)."""
    return np.linspace(-radius, radius, points)


def plane_of(means: Means, radius: float, points: int, tolerance: float, seed: int = 0) -> Plane:
    """The plane of a function of (x, y), given as `means` of many of them.

    tolerance 0 computes every point. Else a polynomial goes through the values at 9 x 9 Chebyshev points, at 17 x 17
    where it is further than `tolerance`, a share of the values' range, from the function at random points; where that
    is too far off as well, every point is computed.
    """
    grid, checks = axis(radius, points), _checks(radius, seed)
    known: dict[tuple[float, float], float] = {}

    def values(wanted: Sequence[tuple[float, float]]) -> list[float]:
        new = [point for point in dict.fromkeys(wanted) if point not in known]
        known.update(zip(new, means(new), strict=True))
        return [known[point] for point in wanted]

    seen = np.array(values(checks)) if tolerance > 0 else np.zeros(0)
    for nodes in _NODES if tolerance > 0 else ():
        if nodes >= points:
            break
        at = chebyshev(radius, nodes)
        table = np.array(values([(x, y) for y in at for x in at])).reshape(nodes, nodes)
        through = _interpolated(at, table, [x for x, _ in checks], [y for _, y in checks]).diagonal()
        error = float(np.abs(through - seen).max())
        if error <= tolerance * float(np.ptp(table)):
            return Plane(grid, grid, _interpolated(at, table, grid, grid), len(known), error)
    found = values([(float(x), float(y)) for y in grid for x in grid])
    return Plane(grid, grid, np.array(found).reshape(points, points), points**2)


def chebyshev(radius: float, nodes: int) -> list[float]:
    """Chebyshev points of the second kind from -radius to radius; those of 9 are among those of 17."""
    found = [-radius * math.cos(math.pi * number / (nodes - 1)) for number in range(nodes)]
    found[nodes // 2] = 0.0
    return [round(value / radius, 12) * radius for value in found]


def _checks(radius: float, seed: int) -> list[tuple[float, float]]:
    drawn = torch.rand(_CHECKS, 2, generator=make_generator(seed, "plane checks"), dtype=torch.float64)
    return [(float(x), float(y)) for x, y in (2 * drawn - 1) * radius]


def _interpolated(at: Sequence[float], table: np.ndarray, xs: Any, ys: Any) -> np.ndarray:
    """[Y, X] the polynomial through `table` [ys, xs] of the points `at`, at ys and xs."""
    from scipy.interpolate import BarycentricInterpolator

    along = BarycentricInterpolator(at, table.T)(xs)  # [X, nodes of y]
    return BarycentricInterpolator(at, along.T)(ys)


class InputLoss:
    """Cross-entropy of examples by a delta on their movable embeddings, the prompt's keys and values computed once.

    Deltas are [M, H], over the row's movable tokens alone, in units of the mean embedding norm: the same tokens
    whatever the prompt's length, so that directions serve several prompts. budget: tokens of a pass.
    """

    def __init__(self, backbone: Backbone, subject: Subject, examples: Sequence[Example], budget: int) -> None:
        serve_rows(backbone, subject.trained, subject.rows)
        self.backbone, self.examples, self.rows = backbone, examples, backbone.rows  # one that pads has its own
        self.trained, self.shared = subject.trained.to(backbone.device), self.rows.shared_start(examples)
        self.row = self._packed(1)
        with torch.no_grad():
            self.prefix = backbone.cache_prefix(self.trained, self.row.shared_ids)
            self.clean_TH = backbone.inputs(self.row, self.trained)
        self.unit, self.most = backbone.mean_embedding_norm(), max(1, budget // self.row.num_tokens)

    def _packed(self, copies: int) -> PackedRow:
        return self.rows.pack(list(self.examples) * copies, self.shared).to(self.backbone.device)

    def spread(self, delta_MH: Tensor) -> Tensor:
        """[T, H] the delta on the row's tokens, in the embeddings' own units."""
        whole = torch.zeros(self.row.num_tokens, delta_MH.shape[1], device=self.backbone.device)
        return whole.index_copy(0, self.row.movable.nonzero()[:, 0], self.unit * delta_MH)

    def unit_length(self, delta_MH: Tensor) -> Tensor:
        """The delta scaled to norm 1 in every example; 0 stays 0."""
        norms = example_norm(self.spread(delta_MH), self.row.places) / self.unit
        return delta_MH / norms.clamp_min(1e-30)[self.row.example_of[self.row.movable]][:, None]

    def dot(self, left_MH: Tensor, right_MH: Tensor) -> Tensor:
        """[B] each example's inner product."""
        places = self.row.example_of[self.row.movable]
        sums = torch.zeros(self.row.num_examples, device=left_MH.device)
        return sums.index_add(0, places, (left_MH * right_MH).sum(-1))

    def means(self, deltas: Iterable[Tensor]) -> list[float]:
        """The mean cross-entropy at each delta: as many copies of the rows in a pass as the budget takes."""
        found: list[float] = []
        row = self._packed(self.most)
        with torch.no_grad():
            for some in _batched(deltas, self.most):
                if len(some) < self.most:
                    row = self._packed(len(some))
                delta_TH = torch.cat([self.spread(delta) for delta in some])
                inputs = row.moved(self.clean_TH.repeat(len(some), 1), delta_TH)
                scores = self.backbone.score(row, inputs, self.trained, prefix=self.prefix, narrow=True)[0]
                losses = -log_probabilities(scores).gather(1, row.gold[:, None])
                found += losses.view(len(some), -1).mean(1).tolist()
        return found

    def gradient(self, delta_MH: Tensor) -> Tensor:
        """[M, H] each example's gradient of its own cross-entropy, in nats a unit."""
        delta = delta_MH.detach().clone().requires_grad_()
        with self.backbone.shards.outside_layers(), torch.enable_grad():
            inputs = self.row.moved(self.clean_TH, self.spread(delta))
            scores = self.backbone.score(self.row, inputs, self.trained, prefix=self.prefix, narrow=True)[0]
            (gradient,) = torch.autograd.grad(cross_entropy_sum(scores, self.row.gold), delta)
        return gradient

    def zero(self) -> Tensor:
        """[M, H] no delta."""
        return torch.zeros(int(self.row.movable.sum()), self.backbone.width, device=self.backbone.device)

    def curvature(self, seed: int = 0) -> Tensor:
        """[B] each example's curvature of largest size at delta 0; see top_curvature."""
        start = torch.randn(self.zero().shape, generator=make_generator(seed, "curvature")).to(self.backbone.device)
        return top_curvature(self.gradient, self.unit_length(start), self.unit_length, self.dot)


def top_curvature(
    gradient: Callable[[Tensor], Tensor], start: Tensor, unit_length: Callable[[Tensor], Tensor],
    dot: Callable[[Tensor, Tensor], Tensor], rounds: int = _ROUNDS,
) -> Tensor:  # fmt: skip
    """The second derivative of largest size at 0, by power iteration on differences of gradients; its sign is kept.

    Several functions at once where `unit_length` and `dot` treat each one's part of `start` by itself.
    """
    direction = found = start
    for _ in range(rounds):
        product_ = (gradient(_STEP * direction) - gradient(-_STEP * direction)) / (2 * _STEP)
        found, direction = dot(direction, product_), unit_length(product_)
    return found


def input_axes(losses: Sequence[InputLoss], seed: int = 0) -> tuple[Tensor, Tensor]:
    """X and Y [M, H] for all prompts: the mean of their gradients' directions, and a random one orthogonal to it."""
    first = losses[0]
    gradients = [loss.unit_length(loss.gradient(loss.zero())) for loss in losses]
    across = first.unit_length(torch.stack(gradients).sum(0))
    drawn = torch.randn(across.shape, generator=make_generator(seed, "landscape")).to(across.device)
    along = first.dot(across, drawn)[first.row.example_of[first.row.movable]][:, None]
    return across, first.unit_length(drawn - along * across)


def input_plane(
    loss: InputLoss, axes: tuple[Tensor, Tensor], radius: float, points: int, tolerance: float = 0.0, seed: int = 0
) -> Plane:
    """Mean cross-entropy over the plane of two directions of deltas; see plane_of. radius in mean embedding norms."""

    def means(at: Sequence[tuple[float, float]]) -> list[float]:
        return loss.means(x * axes[0] + y * axes[1] for x, y in at)

    return plane_of(means, radius, points, tolerance, seed)


def prompt_axes(prompt_PW: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two random directions of a prompt, each row of them as long as the prompt's; the same draws for every prompt."""
    drawn = torch.randn(2, *prompt_PW.shape, generator=make_generator(seed, "prompt landscape")).to(prompt_PW)
    scaled = drawn * (prompt_PW.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))
    return scaled[0], scaled[1]


def prompt_plane(
    backbone: Backbone, subject: Subject, examples: Sequence[Example], ranks: Ranks, budget: int, radius: float,
    points: int, tolerance: float = 0.0, seed: int = 0,
) -> Plane:  # fmt: skip
    """Mean cross-entropy over a plane of prompts, many in a pass; see plane_of. radius: in norms of its rows."""
    prompt, head = backbone.head.split(subject.trained)
    across, along = prompt_axes(prompt, seed)
    gold = torch.tensor([example.gold for example in examples])

    def means(at: Sequence[tuple[float, float]]) -> list[float]:
        found = []
        for some in _batched(at, _AT_ONCE):
            moved = [backbone.head.join(prompt + x * across + y * along, head) for x, y in some]
            asked = [Questions(trained, examples, subject.rows) for trained in moved]
            scores = score_prompts(backbone, asked, ranks, budget)
            found += [float(cross_entropy_sum(scores_NC, gold)) / len(examples) for scores_NC in scores]
        return found

    return plane_of(means, radius, points, tolerance, seed)
