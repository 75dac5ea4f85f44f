"""perturb_step: kernel and reference against an fp64 loop over examples, for every norm, shape and dtype."""

import pytest
import torch

from ptp_ds.choices import NORMS
from ptp_ds.kernels import Places, perturb_step
from tests.support.kernel_cases import DTYPES, IMPLS, LENGTHS, WIDTHS, assert_close, every_second, make_places, randn

RADIUS, LENGTH = 0.5, 0.4


def plain_step(delta, gradient, places: Places, norm: str, embeds=None):
    """The formula, example by example and token by token, in fp64."""
    delta, gradient = delta.double().cpu(), gradient.double().cpu()
    new = torch.zeros_like(delta)
    groups = [places.example_of.cpu() == example for example in range(places.examples)]
    if norm == "token_l2":
        groups = [torch.arange(places.tokens) == token for token in range(places.tokens)]
    for group in groups:
        some = group & places.movable.cpu()
        d, g = delta[some], gradient[some]
        if norm == "linf":
            new[some] = (d + LENGTH * g.sign()).clamp(-RADIUS, RADIUS)
            continue
        size = g.norm()
        moved = d + LENGTH * g / size if size != 0 else d
        new[some] = moved * min(1.0, RADIUS / moved.norm()) if moved.norm() == moved.norm() else moved * torch.nan
    if embeds is None:
        return new, None
    taken = new if places.source is None else new[places.source.cpu()]
    return new, embeds.double().cpu() + taken


def given(lengths, width, dtype, seed=0):
    tokens = sum(lengths)
    return 0.1 * randn(tokens, width, seed=seed), randn(tokens, width, seed=seed + 1, dtype=dtype)


CASES = [*zip(LENGTHS, WIDTHS, strict=True), ([2, 3], 1030)]
_LARGE = LENGTHS[-1]  # where the interpreter takes seconds: in every norm and dtype by the slow tests alone


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("lengths", "width", "norm", "dtype"),
    [
        pytest.param(
            *case, norm, dtype, marks=[pytest.mark.slow] if case[0] is _LARGE and (norm, dtype) not in
            (("frobenius", torch.float32), ("token_l2", torch.bfloat16)) else [],
        )
        for case in CASES for norm in NORMS for dtype in DTYPES
    ],
)  # fmt: skip
def test_a_step_is_the_formula(lengths, width, norm, dtype, impl):
    places = make_places(lengths, still=len(lengths) > 1)
    delta, gradient = given(lengths, width, dtype)
    embeds = randn(sum(lengths), width, seed=5, dtype=dtype)
    settings = {"norm": norm, "radius": RADIUS, "length": LENGTH, "impl": impl}
    found, moved = perturb_step(delta, gradient, places, embeds_TH=embeds, **settings)
    expected, _ = plain_step(delta, gradient, places, norm)
    assert found.dtype == torch.float32
    assert moved.dtype == dtype
    assert_close(found, expected, torch.float32, factor=4)  # a hair inside the ball
    assert_close(moved, embeds.double() + found.double(), dtype)
    assert not found[~places.movable].any()
    again, moved_again = perturb_step(delta, gradient, places, embeds_TH=embeds, **settings)
    assert torch.equal(found, again)
    assert torch.equal(moved, moved_again)
    assert torch.equal(perturb_step(delta, gradient, places, **settings)[0], found)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", NORMS)
def test_many_steps_never_leave_the_ball(norm, impl):
    lengths, width = [17, 1, 4], 48
    places = make_places(lengths)
    delta = torch.zeros(sum(lengths), width, device=places.movable.device)
    for number in range(8):
        gradient = randn(sum(lengths), width, seed=number)
        delta, _ = perturb_step(delta, gradient, places, norm=norm, radius=RADIUS, length=2.7, impl=impl)
        parts = delta.double().split(lengths)
        sizes = {"frobenius": [part.norm() for part in parts], "token_l2": delta.double().norm(dim=-1),
                 "linf": delta.abs().flatten()}[norm]  # fmt: skip
        assert max(map(float, sizes)) <= RADIUS


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", NORMS)
def test_a_token_takes_anothers_delta(norm, impl):
    lengths, width = [4, 1, 6], 12
    places = make_places(lengths, sources=True)
    delta, gradient = given(lengths, width, torch.float32)
    embeds = randn(sum(lengths), width, seed=5)
    settings = {"norm": norm, "radius": RADIUS, "length": LENGTH, "impl": impl}
    found, moved = perturb_step(delta, gradient, places, embeds_TH=embeds, **settings)
    expected, expected_moved = plain_step(delta, gradient, places, norm, embeds)
    assert_close(found, expected, torch.float32, factor=4)
    assert_close(moved, expected_moved, torch.float32, factor=4)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_do_not_lie_one_behind_the_other(impl):
    places = make_places([5, 3])
    delta, gradient = given([5, 3], 9, torch.float32)
    settings = {"norm": "frobenius", "radius": RADIUS, "length": LENGTH, "impl": impl}
    expected = perturb_step(delta, gradient, places, **settings)[0]
    assert torch.equal(perturb_step(every_second(delta), every_second(gradient), places, **settings)[0], expected)
    assert torch.equal(perturb_step(delta, gradient.T.contiguous().T, places, **settings)[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_finite_is_passed_on(norm, bad, impl):
    lengths = [4, 3]
    places = make_places(lengths)
    places = Places(torch.ones_like(places.movable), places.example_of, places.starts, places.numbers)
    delta, gradient = given(lengths, 6, torch.float32)
    gradient[1, 2] = bad
    found, moved = perturb_step(
        delta, gradient, places, norm=norm, radius=RADIUS, length=LENGTH, embeds_TH=delta, impl=impl
    )
    hit = torch.zeros_like(found, dtype=torch.bool)
    hit[{"frobenius": (slice(0, 4), slice(None)), "token_l2": (1, slice(None)), "linf": (1, 2)}[norm]] = True
    if norm == "linf" and bad == float("inf"):
        hit[1, 2] = False  # its sign is known
    assert torch.equal(found.isnan(), hit)
    assert torch.equal(moved.isnan(), hit)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_step(norm, impl):
    places = make_places([4, 2])
    zero = torch.zeros(6, 8, device=places.movable.device)
    found, _ = perturb_step(zero, zero, places, norm=norm, radius=RADIUS, length=LENGTH, impl=impl)
    assert torch.equal(found, zero)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [1e-10, 1e-14, 1e-18, 1e-24, 1e-28, 1e-36])
def test_a_tiny_gradient_stays_in_the_ball(size, norm, impl):
    """Of answers tens of nats apart: its squares underflow, and what isn't measured isn't projected."""
    lengths = [5, 3]
    places = make_places(lengths)
    delta, gradient = given(lengths, 48, torch.float32)
    settings = {"norm": norm, "radius": RADIUS, "length": LENGTH, "impl": impl}
    delta, _ = perturb_step(delta, gradient, places, **settings)
    found, _ = perturb_step(delta, gradient * size, places, **settings)
    parts = found.double().split(lengths)
    sizes = {"frobenius": [part.norm() for part in parts], "token_l2": found.double().norm(dim=-1),
             "linf": found.abs().flatten()}[norm]  # fmt: skip
    assert max(map(float, sizes)) <= RADIUS
    if norm != "linf" and size < 1e-16:
        assert_close(found, delta, torch.float32, factor=4)
    else:
        assert_close(found, plain_step(delta, gradient, places, norm)[0], torch.float32, factor=4)


def test_fp64_stays_with_the_reference_and_names_are_checked():
    places = make_places([2])
    delta = torch.zeros(2, 3, dtype=torch.float64, device=places.movable.device)
    assert perturb_step(delta, delta, places, norm="linf", radius=1.0, length=1.0)[0].dtype == torch.float64
    with pytest.raises(ValueError, match="Unknown norm 'l1'; choose from frobenius, token_l2, linf"):
        perturb_step(delta, delta, places, norm="l1", radius=1.0, length=1.0)
    with pytest.raises(ValueError, match="kernels know fp32, bf16 and fp16, not float64"):
        perturb_step(delta, delta, places, norm="linf", radius=1.0, length=1.0, impl="triton")
