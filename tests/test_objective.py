"""Divergences and cross-entropy against their definitions; sums, ragged candidates, gradients to both streams."""

import math

import pytest
import torch
import torch.nn.functional as F

from ptp_ds.objective import DIVERGENCES, cross_entropy_sum, divergence_sum
from tests.support.reference import relative_error

GOLD = torch.tensor([0, 2, 1])


def streams(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 3, dtype=torch.float64, generator=generator).float().requires_grad_() for _ in range(2)]


def by_definition(kind, clean, perturbed):
    p, q = clean.softmax(-1), perturbed.softmax(-1)
    kl = lambda a, b: F.kl_div(b.log(), a, reduction="sum")  # noqa: E731
    middle = (p + q) / 2
    return {"kl": kl(p, q), "sym_kl": kl(p, q) + kl(q, p), "js": (kl(p, middle) + kl(q, middle)) / 2,
            "ce": F.cross_entropy(perturbed, GOLD, reduction="sum")}[kind]  # fmt: skip


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_value_and_gradients(kind):
    clean, perturbed = streams()
    ours = divergence_sum(kind, clean, perturbed, GOLD)
    theirs = by_definition(kind, clean, perturbed)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    inputs = (perturbed,) if kind == "ce" else (clean, perturbed)
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_absent_candidates_count_nothing(kind):
    clean, perturbed = streams(1)
    padded = [F.pad(scores, (0, 2), value=float("-inf")) for scores in (clean, perturbed)]
    ours = divergence_sum(kind, *padded, GOLD)
    torch.testing.assert_close(ours, divergence_sum(kind, clean, perturbed, GOLD))
    for gradient in torch.autograd.grad(ours, (clean, perturbed), allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("clean_fixed", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_rows_below_the_least_confidence_are_as_if_they_were_not_there(kind, clean_fixed):
    clean, perturbed = streams(2)
    likeliest = clean.softmax(-1).amax(-1)
    least = float(likeliest.sort().values[1])  # itself still counts
    counted = likeliest >= least
    assert counted.sum() == 2
    ours = divergence_sum(kind, clean, perturbed, GOLD, clean_fixed, least)
    theirs = divergence_sum(kind, clean[counted], perturbed[counted], GOLD[counted], clean_fixed)
    torch.testing.assert_close(ours, theirs)
    pairs = [torch.autograd.grad(value, (clean, perturbed), allow_unused=True) for value in (ours, theirs)]
    for mine, own in zip(*pairs, strict=True):
        assert (mine is None) == (own is None)
        if own is not None:
            torch.testing.assert_close(mine, own)
    assert float(divergence_sum(kind, clean, perturbed, GOLD, clean_fixed, 0.9999)) == 0


@pytest.mark.parametrize("kind", ["kl", "sym_kl", "js"])
def test_equal_streams_have_no_divergence_and_no_gradient(kind):
    clean, _ = streams()
    value = divergence_sum(kind, clean, clean, GOLD)
    assert value.item() == pytest.approx(0.0, abs=1e-7)
    assert float(torch.autograd.grad(value, clean)[0].abs().max()) < 1e-7


def test_js_is_bounded_by_log_two():
    far = torch.tensor([[50.0, -50.0]])
    assert divergence_sum("js", far, -far, torch.tensor([0])).item() == pytest.approx(math.log(2), rel=1e-5)


def test_sums_do_not_depend_on_how_rows_are_grouped():
    clean, perturbed = streams()
    whole = cross_entropy_sum(clean, GOLD) + divergence_sum("kl", clean, perturbed, GOLD)
    parts = sum(
        cross_entropy_sum(clean[i : i + 1], GOLD[i : i + 1])
        + divergence_sum("kl", clean[i : i + 1], perturbed[i : i + 1], GOLD[i : i + 1])
        for i in range(3)
    )
    torch.testing.assert_close(whole, parts)
