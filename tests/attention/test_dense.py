"""The CPU's bf16 attention: in fp64 one dense masked softmax token by token, in bf16 as near to it as torch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp_ds.attention import dense as dense_attention
from ptp_ds.attention.dense import dense_attend, dense_serves
from ptp_ds.attention.plan import plan_tree
from ptp_ds.attention.tree import attend_tree, attend_tree_reference
from ptp_ds.packing.row import Block
from tests.attention.test_tree import dense
from tests.support.trees import packed_rows

ROWS = [Block(length, (0,), (-1,)) for length in (40, 61, 90, 33, 88, 12)]


def drawn(tokens, heads, dtype, seed=0):
    """Queries, keys, values of `tokens` tokens; two queries a key head."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tokens, count, 16, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for count in (2 * heads, heads, heads)
    ]


@given(rows=packed_rows, prefix=st.integers(0, 40), heads=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_equals_attention_by_its_definition(rows, prefix, heads, seed):
    """Branching blocks, blocks of both directions, buckets of several lengths; gradients of all that goes in."""
    q, k, v = drawn(prefix + sum(block.length for block in rows), heads, torch.float64, seed)
    expected = dense(q, k, v, rows, prefix, 0.3, None, None)[prefix:]
    given_prefix = (k[:prefix], v[:prefix]) if prefix else None
    out = dense_attend(q[prefix:], k[prefix:], v[prefix:], plan_tree(rows, 0, prefix, "cpu"), given_prefix, 0.3)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-8, rtol=0)


@pytest.mark.parametrize("prefix", [0, 100])
def test_in_bf16_no_farther_from_exact_than_torchs_own(prefix):
    """The exact one computes in fp64 on the same rounded numbers; torch's is scaled_dot_product_attention."""
    tensors = drawn(prefix + sum(block.length for block in ROWS), 3, torch.bfloat16)
    plan = plan_tree(ROWS, 0, prefix, "cpu")
    results = []
    for attend, dtype in (
        (attend_tree, torch.bfloat16), (attend_tree_reference, torch.bfloat16), (attend_tree_reference, torch.float64)
    ):  # fmt: skip
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in tensors)
        cache = (k[:prefix], v[:prefix]) if prefix else (k[:0], v[:0])
        out = attend(q[prefix:], k[prefix:], v[prefix:], plan, cache if prefix else None, scale=0.25)
        grads = torch.autograd.grad((out.double() * out.detach().double().cos()).sum(), (q, k, v))
        results.append([x.detach().double() for x in (out, *grads)])
    for ours, torchs, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < 2 * (torchs - exact).norm()
        assert (ours - exact).norm() < 1e-2 * exact.norm()


def test_where_it_serves(monkeypatch):
    plan = plan_tree(ROWS, 0, 100, "cpu")
    q = torch.zeros(1, 4, 8, dtype=torch.bfloat16)
    assert dense_serves(plan, q, True)
    assert not dense_serves(plan, q, False), "the prefix is in the row"
    assert not dense_serves(plan, q.float(), True), "fp32 keeps no probabilities"
    assert not dense_serves(plan, q.to("meta"), True)
    assert not dense_serves(plan_tree([], 0, 100, "cpu"), q, True)
    monkeypatch.setattr(dense_attention, "_LONGEST", 189)
    assert not dense_serves(plan, q, True)


def test_a_frozen_rows_gradient_is_the_prefixs_alone():
    q, k, v = (x.detach() for x in drawn(200, 2, torch.bfloat16))
    keys, values = (x[:50].clone().requires_grad_() for x in (k, v))
    out = dense_attend(q[50:], k[50:], v[50:], plan_tree([Block(150, (0,), (-1,))], 0, 50, "cpu"), (keys, values), 0.2)
    assert all(grad.shape == keys.shape for grad in torch.autograd.grad(out.sum(), (keys, values)))
