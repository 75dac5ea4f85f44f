"""dual_divergence: kernel and reference against torch's own losses in fp64, values and gradients of both streams."""

import pytest
import torch
import torch.nn.functional as F

from ptp_ds.kernels import dual_divergence
from ptp_ds.objective import DIVERGENCES
from tests.support.kernel_cases import DEVICE, DTYPES, IMPLS, assert_close, every_second, randn

# candidates of each example
COUNTS = {"one example": [2], "one candidate": [1, 1], "ragged": [2, 5, 1, 3, 3], "many": [40] * 70, "odd": [7] * 3}


def given(counts, dtype, spread=3.0):
    """Two streams of scores, -inf where a candidate is absent, and the right ones."""
    examples, most = len(counts), max(counts)
    absent = torch.arange(most)[None] >= torch.tensor(counts)[:, None]
    streams = [spread * randn(examples, most, seed=seed, dtype=dtype) for seed in (1, 2)]
    gold = torch.tensor([number % count for number, count in enumerate(counts)])
    return *(x.masked_fill(absent.to(DEVICE), float("-inf")) for x in streams), gold.to(DEVICE)


def plain(clean, perturbed, gold, counts, kind, clean_fixed=False):
    """Cross-entropy and divergence, example by example, from torch's losses."""
    ce = divergence = 0.0
    for number, count in enumerate(counts):
        a, b = (x[number, :count].log_softmax(-1) for x in (clean, perturbed))
        ce = ce + F.nll_loss(a[None], gold[number : number + 1])
        a = a.detach() if clean_fixed else a
        if kind == "ce":
            divergence = divergence + F.nll_loss(b[None], gold[number : number + 1])
            continue
        middle = ((a.exp() + b.exp()) / 2).log()
        pairs = {"kl": [(b, a, 1.0)], "sym_kl": [(b, a, 1.0), (a, b, 1.0)], "js": [(middle, a, 0.5), (middle, b, 0.5)]}
        for of, to, share in pairs[kind]:
            divergence = divergence + share * F.kl_div(of, to, reduction="sum", log_target=True)
    return ce, divergence


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("case", COUNTS)
def test_values_and_gradients(case, kind, dtype, impl):
    counts = COUNTS[case]
    clean, perturbed, gold = given(counts, dtype)
    leaves = [x.clone().requires_grad_() for x in (clean, perturbed)]
    exact = [x.double().requires_grad_() for x in (clean, perturbed)]
    found = dual_divergence(*leaves, gold, kind, reg_weight=0.7, count=9, impl=impl)
    ce, divergence = plain(*exact, gold, counts, kind)
    assert_close(found.cross_entropy, ce, torch.float32, factor=4)
    assert_close(found.divergence, divergence, torch.float32, factor=4)
    assert_close(found.total, (ce + 0.7 * divergence) / 9, torch.float32, factor=4)
    assert not found.cross_entropy.requires_grad
    assert not found.divergence.requires_grad
    grad_output = torch.tensor(-2.5, device=DEVICE)
    ours = torch.autograd.grad(found.total, leaves, grad_output)
    theirs = torch.autograd.grad((ce + 0.7 * divergence) / 9 * -2.5, exact, allow_unused=True)
    for our, their, leaf in zip(ours, theirs, leaves, strict=True):
        assert our.dtype == dtype
        present = leaf.detach() != float("-inf")
        expected = torch.zeros_like(our, dtype=torch.float64) if their is None else their
        assert_close(our[present], expected[present], dtype, factor=4)
        assert not our[~present].any()
    again = dual_divergence(*leaves, gold, kind, reg_weight=0.7, count=9, impl=impl)
    assert torch.equal(again.total, found.total)
    assert all(map(torch.equal, torch.autograd.grad(again.total, leaves, grad_output), ours))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("case", ["one candidate", "ragged"])
def test_a_fixed_clean_stream_gets_the_cross_entropys_gradient_alone(case, kind, impl):
    """Values as before; the divergence's gradient goes to the perturbed stream, as if the clean one were data."""
    counts = COUNTS[case]
    clean, perturbed, gold = given(counts, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (clean, perturbed)]
    exact = [x.double().requires_grad_() for x in (clean, perturbed)]
    found = dual_divergence(*leaves, gold, kind, reg_weight=0.7, count=9, clean_fixed=True, impl=impl)
    both = dual_divergence(*leaves, gold, kind, reg_weight=0.7, count=9, impl=impl)
    assert torch.equal(found.total, both.total)
    assert torch.equal(found.divergence, both.divergence)
    ce, divergence = plain(*exact, gold, counts, kind, clean_fixed=True)
    theirs = torch.autograd.grad((ce + 0.7 * divergence) / 9, exact, allow_unused=True)
    ours = torch.autograd.grad(found.total, leaves)
    for our, their, leaf in zip(ours, theirs, leaves, strict=True):
        present = leaf.detach() != float("-inf")
        assert_close(our[present], their[present], torch.float32, factor=4)
    alone = torch.autograd.grad(plain(*exact, gold, counts, "ce")[0] / 9, exact[0])[0]
    present = clean != float("-inf")
    assert_close(ours[0][present], alone[present], torch.float32, factor=4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize(("clean_fixed", "of_label"), [(False, False), (True, False), (True, True), (False, True)])
def test_rows_that_are_not_confident_have_their_cross_entropy_alone(kind, clean_fixed, of_label, impl):
    counts = COUNTS["ragged"]
    clean, perturbed, gold = given(counts, torch.float32)
    chances = clean.softmax(-1)
    sure = chances[range(len(counts)), gold] if of_label else chances.amax(-1)
    least = float((sure.sort().values[1] + sure.sort().values[2]) / 2)
    kept = (sure >= least).tolist()
    assert sum(kept) == 3
    assert (kept == (chances.amax(-1) >= least).tolist()) == (not of_label)
    leaves = [x.clone().requires_grad_() for x in (clean, perturbed)]
    exact = [x.double().requires_grad_() for x in (clean, perturbed)]
    how = {"clean_fixed": clean_fixed, "min_confidence": least, "of_label": of_label, "reg_weight": 0.7, "impl": impl}
    found = dual_divergence(*leaves, gold, kind, **how)
    ce = plain(*exact, gold, counts, kind)[0]
    rows = [row for row, counted in enumerate(kept) if counted]
    few = [counts[row] for row in rows]
    divergence = plain(*(x[rows] for x in exact), gold[rows], few, kind, clean_fixed)[1]
    assert_close(found.divergence, divergence, torch.float32, factor=4)
    assert_close(found.total, ce + 0.7 * divergence, torch.float32, factor=4)
    theirs = torch.autograd.grad(ce + 0.7 * divergence, exact)
    present = clean != float("-inf")
    for our, their in zip(torch.autograd.grad(found.total, leaves), theirs, strict=True):
        assert_close(our[present], their[present], torch.float32, factor=4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["kl", "sym_kl", "js"])
def test_equal_streams_have_no_divergence_and_no_gradient_of_it(kind, impl):
    clean, _, gold = given([3, 5, 2], torch.float32)
    leaves = [clean.clone().requires_grad_() for _ in range(2)]
    found = dual_divergence(*leaves, gold, kind, ce_weight=0.0, reg_weight=1.0, impl=impl)
    assert abs(float(found.divergence)) < 1e-6
    for gradient in torch.autograd.grad(found.total, leaves):
        assert float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_far_apart_streams_stay_finite(impl):
    clean = torch.tensor([[200.0, 0.0], [0.0, 90.0]], device=DEVICE, requires_grad=True)
    perturbed = torch.tensor([[0.0, 200.0], [95.0, 0.0]], device=DEVICE, requires_grad=True)
    gold = torch.tensor([0, 1], device=DEVICE)
    for kind in DIVERGENCES:
        found = dual_divergence(clean, perturbed, gold, kind, reg_weight=1.0, impl=impl)
        exact = [x.detach().double() for x in (clean, perturbed)]
        assert_close(found.divergence, plain(*exact, gold, [2, 2], kind)[1], torch.float32)
        for gradient in torch.autograd.grad(found.total, (clean, perturbed)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_what_is_not_finite_is_passed_on(kind, impl):
    clean, perturbed, gold = given([3, 3], torch.float32)
    for hit in (clean, perturbed):
        broken = [x.clone() for x in (clean, perturbed)]
        broken[0 if hit is clean else 1][1, 0] = float("nan")
        leaves = [x.requires_grad_() for x in broken]
        found = dual_divergence(*leaves, gold, kind, reg_weight=1.0, impl=impl)
        assert found.total.isnan()
        gradients = torch.autograd.grad(found.total, leaves)
        assert any(gradient[1].isnan().all() for gradient in gradients)
        assert all(gradient[0].isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_that_are_slices(impl):
    clean, perturbed, gold = given([3, 2, 3], torch.float32)
    expected = dual_divergence(clean, perturbed, gold, "kl", reg_weight=1.0, impl=impl).total
    gaps = dual_divergence(every_second(clean), perturbed.T.contiguous().T, gold, "kl", reg_weight=1.0, impl=impl)
    assert torch.equal(gaps.total, expected)


def test_an_unknown_divergence_is_refused():
    clean, perturbed, gold = given([2], torch.float32)
    with pytest.raises(ValueError, match="Unknown divergence 'mse'; choose from kl, sym_kl, js, ce"):
        dual_divergence(clean, perturbed, gold, "mse", reg_weight=1.0)
