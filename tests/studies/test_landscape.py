"""Planes, their numbers and curvature: on functions whose answer is known, and against plain forwards."""

import numpy as np
import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.padded import PaddedBackbone
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.studies.landscape import (
    InputLoss,
    Plane,
    Subject,
    axis,
    input_axes,
    input_plane,
    plane_of,
    prompt_axes,
    prompt_plane,
    top_curvature,
)
from tests.support.packed import make_prompt
from tests.support.reference import make_examples, make_model, plain_scores, with_instruction

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def quadratic(a, b, c, points=41, radius=2.0):
    """1 + a x^2 / 2 + b x y + c y^2 / 2 as a plane."""
    grid = axis(radius, points)
    xs, ys = np.meshgrid(grid, grid)
    return Plane(grid, grid, 1 + a * xs**2 / 2 + b * xs * ys + c * ys**2 / 2)


def test_numbers_of_a_quadratic():
    plane = quadratic(6.0, 0.0, 2.0)
    assert plane.centre == 1.0
    for radius in (0.5, 1.0, 2.0):
        largest, mean = plane.rise(radius)
        assert largest == pytest.approx(3 * radius**2)  # along x
        assert mean == pytest.approx((6 + 2) / 2 * radius**2 / 4, rel=0.1)  # over the disc
    inner = 2 * (1 - 1 / 20)  # np.gradient is exact inside: the largest slope at a corner's neighbours
    assert 6 * inner <= plane.slope() <= np.hypot(12, 4)
    told = plane.summary([1.0])
    assert told["largest_rise"]["1"] == pytest.approx(3.0)


def test_the_largest_curvature_of_quadratics_is_found_with_its_sign():
    """Three functions at once, each with eigenvalues of its own; the largest of the last is negative."""
    generator = torch.Generator().manual_seed(0)
    hessians, expected = [], []
    for values in ((5.0, 1.0, 0.5, 0.1), (2.0, 1.0, -1.0, 0.0), (-4.0, 1.0, 1.0, 2.0)):
        turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
        hessians.append(turn @ torch.diag(torch.tensor(values)) @ turn.T)
        expected.append(values[0])
    matrices = torch.stack(hessians)
    found = top_curvature(
        lambda x: torch.einsum("bij,bj->bi", matrices, x) + 3.0,  # a slope changes nothing
        torch.nn.functional.normalize(torch.randn(3, 4, generator=generator), dim=-1),
        lambda x: torch.nn.functional.normalize(x, dim=-1),
        lambda x, y: (x * y).sum(-1),
        rounds=30,
    )
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-2, rtol=1e-2)


def bowl(x, y):
    return 1 + np.cos(2 * x) * np.exp(y) + 0.3 * x


@pytest.mark.parametrize(
    ("function", "tolerance", "most"),
    [
        (bowl, 0.01, 9 * 9 + 12),
        (lambda x, y: np.cos(6 * x + 2 * y), 0.01, 17 * 17 + 12),
        (bowl, 0.0, 41 * 41),
        (lambda x, y: abs(x) + abs(y), 1e-6, 41 * 41),  # a kink that no polynomial follows
    ],
)
def test_an_interpolation_is_as_near_as_it_says(function, tolerance, most):
    asked = []

    def means(points):
        asked.extend(points)
        return [float(function(x, y)) for x, y in points]

    plane = plane_of(means, 1.5, 41, tolerance)
    xs, ys = np.meshgrid(plane.xs, plane.ys)
    expected = function(xs, ys)
    whole = plane.computed == 41 * 41
    assert len(asked) == len(set(asked)), "no point twice"
    assert plane.computed == most
    assert np.abs(plane.values - expected).max() <= (1e-12 if whole else 3 * tolerance * np.ptp(expected))
    assert plane.error <= tolerance * np.ptp(expected)
    assert plane.values[20, 20] == pytest.approx(function(0.0, 0.0), abs=1e-9), "the centre is computed"


def opened(kind="tree", shape="ragged"):
    backbone, prompt = Backbone(make_model("llama")), make_prompt()
    rows = TreeRows() if kind == "tree" else SeparateRows(kind="causal", prompt_length=prompt.shape[0])
    examples = with_instruction(make_examples(shape)) if kind == "tree" else make_examples(shape)
    return backbone, Subject("p", prompt, rows), examples


def plain_mean(prompt, examples, deltas, family="llama"):
    """Mean cross-entropy by an ordinary forward of every candidate."""
    model, losses = make_model(family), []
    for example, delta in zip(examples, deltas, strict=True):
        scores = plain_scores(model, prompt, example, delta)
        losses.append(-scores.log_softmax(-1)[example.gold])
    return float(torch.stack(losses).mean())


def per_example(loss, delta_MH, examples):
    """[context, H] deltas of each example's context, in the embeddings' units: from those of its movable tokens."""
    found, start = [], 0
    for example in examples:
        whole = torch.zeros(len(example.context_ids), delta_MH.shape[1])
        places = torch.tensor(example.movable).nonzero()[:, 0]
        whole[places] = loss.unit * delta_MH[start : start + len(places)]
        start += len(places)
        found.append(whole)
    assert start == delta_MH.shape[0]
    return found


@pytest.mark.parametrize("budget", [1, 300, 4096])
@pytest.mark.parametrize("kind", ["tree", "separate"])
def test_a_plane_of_deltas_equals_plain_forwards(kind, budget):
    backbone, subject, examples = opened(kind, "ragged" if kind == "tree" else "single")
    loss = InputLoss(backbone, subject, examples, budget)
    across, along = input_axes([loss])
    moves = torch.tensor([any(example.movable) for example in examples])
    for direction in (across, along):  # a row whose words may not move stays where it is
        torch.testing.assert_close(loss.dot(direction, direction), moves.float())
    torch.testing.assert_close(loss.dot(across, along), torch.zeros(len(examples)), atol=1e-5, rtol=0)
    plane = input_plane(loss, (across, along), 0.5, 5)
    for row, column in ((0, 0), (2, 2), (4, 1), (2, 4)):
        delta = plane.xs[column] * across + plane.ys[row] * along
        expected = plain_mean(subject.trained, examples, per_example(loss, delta, examples))
        assert plane.values[row, column] == pytest.approx(expected, rel=1e-4)
    rising = plane.values[2, 3:] - plane.values[2, 2]
    assert (rising > 0).all(), "X is the direction of ascent"


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_planes_of_a_family_that_is_padded(family):
    """Its own rows carry the prompt: both spaces have the same centre, that of plain forwards."""
    backbone = PaddedBackbone(Backbone(make_model(family)))
    examples = with_instruction(make_examples("single"))
    still = [torch.zeros(len(example.context_ids), 32) for example in examples]
    for prompt in (make_prompt(), -2 * make_prompt()):
        subject, expected = Subject("p", prompt, TreeRows()), plain_mean(prompt, examples, still, family)
        loss = InputLoss(backbone, subject, examples, 300)
        assert input_plane(loss, input_axes([loss]), 0.5, 3).centre == pytest.approx(expected, rel=1e-4)
        plane = prompt_plane(backbone, subject, examples, ALONE, 4096, 0.5, 3)
        assert plane.centre == pytest.approx(expected, rel=1e-4)


def test_no_rise_is_told_where_no_point_lies():
    plane = Plane(axis(1.0, 9), axis(1.0, 9), np.add.outer(axis(1.0, 9) ** 2, axis(1.0, 9) ** 2))
    assert plane.rise(0.1) == (None, None), "points lie 0.25 apart"
    assert plane.rise(0.25) == (pytest.approx(0.0625), pytest.approx(4 * 0.0625 / 5))
    assert plane.summary([0.1])["largest_rise"] == {"0.1": None}


def test_the_gradient_is_the_slope_along_x():
    backbone, subject, examples = opened()
    loss = InputLoss(backbone, subject, examples, 4096)
    across, _ = input_axes([loss])
    slope = loss.dot(loss.gradient(loss.zero()), across).mean()
    low, high = loss.means([-0.01 * across, 0.01 * across])
    assert float(slope) == pytest.approx((high - low) / 0.02, rel=1e-2)


def test_the_curvature_is_at_least_that_along_any_direction():
    backbone, subject, examples = opened()
    loss = InputLoss(backbone, subject, examples, 4096)
    top = loss.curvature()
    drawn = loss.unit_length(torch.randn(loss.zero().shape, generator=torch.Generator().manual_seed(3)))
    step = 0.05
    along = loss.dot(drawn, (loss.gradient(step * drawn) - loss.gradient(-step * drawn)) / (2 * step))
    assert (top.abs() >= along.abs() - 1e-3).all()


def test_prompts_of_two_lengths_share_their_axes():
    backbone, subject, examples = opened()
    other = Subject("q", 0.3 * torch.randn(9, 32, generator=torch.Generator().manual_seed(2)), TreeRows())
    losses = [InputLoss(backbone, one, examples, 4096) for one in (subject, other)]
    across, along = input_axes(losses)
    planes = [input_plane(loss, (across, along), 0.2, 3) for loss in losses]
    for one, plane in zip((subject, other), planes, strict=True):
        expected = plain_mean(one.trained, examples, [torch.zeros(len(e.context_ids), 32) for e in examples])
        assert plane.centre == pytest.approx(expected, rel=1e-4)


def test_a_plane_of_prompts_equals_plain_forwards():
    backbone, subject, examples = opened()
    across, along = prompt_axes(subject.trained, 4)
    for direction in (across, along):
        torch.testing.assert_close(direction.norm(dim=-1), subject.trained.norm(dim=-1))
    plane = prompt_plane(backbone, subject, examples, ALONE, 4096, 0.5, 3, seed=4)
    still = [torch.zeros(len(example.context_ids), 32) for example in examples]
    for row, column in ((0, 2), (1, 1)):
        prompt = subject.trained + plane.xs[column] * across + plane.ys[row] * along
        assert plane.values[row, column] == pytest.approx(plain_mean(prompt.float(), examples, still), rel=1e-4)


def test_an_interpolated_plane_of_a_model_is_the_computed_one():
    backbone, subject, examples = opened()
    loss = InputLoss(backbone, subject, examples, 4096)
    axes = input_axes([loss])
    whole, fast = (input_plane(loss, axes, 0.5, 21, tolerance) for tolerance in (0.0, 0.01))
    assert fast.computed < whole.computed == 441
    assert np.abs(fast.values - whole.values).max() < 0.03 * np.ptp(whole.values)
    assert fast.rise(0.25)[0] == pytest.approx(whole.rise(0.25)[0], rel=0.05)
