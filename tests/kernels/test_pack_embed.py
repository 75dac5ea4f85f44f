"""pack_embed: kernel and reference against a loop over rows, forward and backward."""

import pytest
import torch

from ptp_ds.kernels import Sources, pack_embed
from tests.support.kernel_cases import DEVICE, DTYPES, IMPLS, WIDTHS, assert_close, every_second, randn

# ids (negative: prompt rows), delta_of (-1: none); a prompt of 3 rows, a table of 11, 4 deltas
CASES = {
    "one token": ([2], [-1]),
    "prompt alone": ([-1, -2, -3], [-1, -1, -1]),
    "prefix, clean and moved rows": ([-1, -2, -3, 7, 1, 2, 1, 10, 1, 2, 1, 10], [-1] * 8 + [0, 1, 2, 3]),
    "a prompt in every row": ([5, -1, -2, -3, 6, -1, -2, -3, 0, -3], [0, 1, -1, -1, 2, 1, -1, -1, 3, 3]),
}


def plain(table, prompt, ids, delta, delta_of):
    rows = []
    for number, taken in zip(ids, delta_of, strict=True):
        row = table[number] if number >= 0 else prompt[-number - 1]
        rows.append(row if taken < 0 else row + delta[taken])
    return torch.stack(rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 1030])
@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_are_the_loops(case, width, dtype, impl):
    ids, delta_of = CASES[case]
    table, prompt, delta = randn(11, width, dtype=dtype), randn(3, width, seed=1, dtype=dtype), randn(4, width, seed=2)
    weight = randn(len(ids), width, seed=3, dtype=dtype)
    sources = Sources(torch.tensor(ids, device=DEVICE), torch.tensor(delta_of, device=DEVICE))
    leaves = [prompt.clone().requires_grad_(), delta.clone().requires_grad_()]
    out = pack_embed(table, leaves[0], sources, leaves[1], impl=impl)
    assert out.dtype == dtype
    found = torch.autograd.grad(out, leaves, weight)
    exact = [x.double().requires_grad_() for x in (prompt, delta)]
    expected = plain(table.double(), exact[0], ids, exact[1], delta_of) + 0 * (exact[0].sum() + exact[1].sum())
    assert_close(out, expected, dtype)
    for ours, theirs, kind in zip(
        found, torch.autograd.grad(expected, exact, weight.double()), (dtype, torch.float32), strict=True
    ):
        assert_close(ours, theirs, kind)
        assert ours.dtype == kind
    again = pack_embed(table, leaves[0], sources, leaves[1], impl=impl)
    assert torch.equal(again, out)
    assert all(map(torch.equal, torch.autograd.grad(again, leaves, weight), found))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_delta_and_with_tensors_that_have_gaps(impl):
    ids, delta_of = CASES["a prompt in every row"]
    sources = Sources(torch.tensor(ids, device=DEVICE), torch.tensor(delta_of, device=DEVICE))
    table, prompt, delta = randn(11, 6), randn(3, 6, seed=1), randn(4, 6, seed=2)
    bare = pack_embed(table, prompt, sources, impl=impl)
    torch.testing.assert_close(bare, plain(table, prompt, ids, delta, [-1] * len(ids)))
    moved = pack_embed(table, prompt, sources, delta, impl=impl)
    gaps = pack_embed(every_second(table), every_second(prompt), sources, every_second(delta), impl=impl)
    assert torch.equal(moved, gaps)
    leaf = prompt.clone().requires_grad_()
    out = pack_embed(table, leaf, sources, delta, impl=impl)
    wide = randn(6, len(ids), seed=3).T  # a gradient that isn't contiguous
    torch.testing.assert_close(
        torch.autograd.grad(out, leaf, wide)[0],
        torch.stack([wide[[n for n, i in enumerate(ids) if i == -row]].sum(0) for row in (1, 2, 3)]),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite_is_passed_on_and_goes_nowhere_else(impl):
    table, prompt, delta = randn(11, 6), randn(3, 6, seed=1), randn(4, 6, seed=2)
    table[7, 1], prompt[1, 2], delta[3, 4] = float("nan"), float("inf"), float("nan")
    ids, delta_of = CASES["prefix, clean and moved rows"]
    sources = Sources(torch.tensor(ids, device=DEVICE), torch.tensor(delta_of, device=DEVICE))
    out = pack_embed(table, prompt, sources, delta, impl=impl)
    wrong = {(3, 1), (1, 2), (11, 4)}
    assert {tuple(place) for place in (~out.isfinite()).nonzero().tolist()} == wrong
    assert out[1, 2] == float("inf")
