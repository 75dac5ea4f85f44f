"""Attention over the tree against one dense masked softmax, on random trees, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptp_ds.attention import plan as tree_plan
from ptp_ds.attention.plan import plan_tree
from ptp_ds.attention.tree import MergedAttention, attend_tree, attend_tree_reference
from ptp_ds.backbone.activations import SavedBytes
from ptp_ds.packing.row import Block
from tests.support.reference import make_model
from tests.support.trees import packed_rows


def dense(q, k, v, rows, prefix, scale, softcap, window, sinks=None):
    """The same attention with one [P + T, P + T] mask built token by token from its definition."""
    path, position, tokens = [], [], 0
    for place in range(prefix):
        path.append(set(range(place + 1)))
        position.append(place)
    tokens = prefix
    for block in rows:
        ends = [*block.starts[1:], block.length]
        for start, end, parent in zip(block.starts, ends, block.parents, strict=True):
            before = set(range(prefix)) if parent < 0 else path[tokens + ends[parent] - 1]
            for place in range(start, end):
                last = place + 1 if block.causal else end
                path.append(before | set(range(tokens + start, tokens + last)))
                position.append(len(before) + place - start)
        tokens += block.length
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool)
    for query in range(tokens):
        for key in path[query]:
            hidden[query, key] = window is not None and abs(position[query] - position[key]) >= window
    logits = logits.masked_fill(hidden, float("-inf"))
    if sinks is not None:  # the sum of exponentials has one term more
        weights = logits.exp() / (logits.exp().sum(-1, keepdim=True) + sinks.exp()[:, None, None])
        return torch.einsum("hqk,khd->qhd", weights, v)
    weights = logits.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


@given(
    rows=packed_rows, prefix=st.integers(0, 4), groups=st.sampled_from([1, 2]),
    softcap=st.sampled_from([None, 0.7]), window=st.sampled_from([None, 3]), seed=st.integers(0, 99),
    worth=st.sampled_from([0, 6000]),
)  # fmt: skip
def test_equals_dense_attention(rows, prefix, groups, softcap, window, seed, worth):
    """worth 0: small blocks, too, are cut into segments where their mask would hide anything."""
    tree_plan.WORTH_A_CALL = worth
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + sum(block.length for block in rows)

    def draw(heads):
        return torch.randn(tokens, heads, 4, dtype=torch.float64, generator=generator).requires_grad_()

    q, k, v, weight = draw(2 * groups), draw(2), draw(2), draw(2 * groups).detach()
    plan = plan_tree(rows, prefix, prefix, "cpu")
    out = attend_tree(q, k, v, plan, scale=0.5, softcap=softcap, window=window)
    expected = dense(q, k, v, rows, prefix, 0.5, softcap, window)
    torch.testing.assert_close(out, expected, atol=1e-9 if softcap is None else 1e-6, rtol=0)
    if prefix and window is None:  # behind a cached prefix, merged by log-sum-exp where there is no soft cap
        cached = attend_tree(
            q[prefix:], k[prefix:], v[prefix:], plan_tree(rows, 0, prefix, "cpu"), (k[:prefix], v[:prefix]), scale=0.5,
            softcap=softcap,
        )  # fmt: skip
        torch.testing.assert_close(cached, expected[prefix:], atol=1e-9 if softcap is None else 1e-6, rtol=0)
        merged, wanted = (
            torch.autograd.grad((rest * weight[prefix:]).sum(), (q, k, v), retain_graph=True)
            for rest in (cached, expected[prefix:])
        )
        for actual, right in zip(merged, wanted, strict=True):
            torch.testing.assert_close(actual, right, atol=1e-8 if softcap is None else 1e-5, rtol=0)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for actual, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-8 if softcap is None else 1e-5, rtol=0)


@given(
    rows=packed_rows, prefix=st.integers(0, 4), groups=st.sampled_from([1, 2]), window=st.sampled_from([None, 3]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_sinks(rows, prefix, groups, window, seed):
    """A logit more for each query head, whose probability goes nowhere; behind a cached prefix, too."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + sum(block.length for block in rows)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    q, k, v, sinks = draw(tokens, 2 * groups, 4), draw(tokens, 2, 4), draw(tokens, 2, 4), draw(2 * groups)
    out = attend_tree(q, k, v, plan_tree(rows, prefix, prefix, "cpu"), scale=0.5, window=window, sinks=sinks)
    expected = dense(q, k, v, rows, prefix, 0.5, None, window, sinks)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)
    pairs = zip(*(torch.autograd.grad((x**2).sum(), (q, k, v, sinks)) for x in (out, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)
    if prefix and window is None:
        plan, cache = plan_tree(rows, 0, prefix, "cpu"), (k[:prefix], v[:prefix])
        cached = attend_tree(q[prefix:], k[prefix:], v[prefix:], plan, cache, scale=0.5, sinks=sinks)
        torch.testing.assert_close(cached, expected[prefix:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("moving", ["all", "all but queries", "the prefix"])
@pytest.mark.parametrize(("softcap", "with_sinks", "window"), [(0.7, False, None), (None, True, 4), (0.7, True, 4)])
def test_what_is_computed_again_is_the_same_and_nothing_else_is_kept(softcap, with_sinks, window, moving):
    """To the bit, whatever is differentiated: values and gradients are those of attention that keeps its matrices."""
    blocks, prefix = [Block(9, (0, 5, 7), (-1, 0, 0)), Block(6, (0,), (-1,)), Block(2, (0,), (-1,))], 3
    generator = torch.Generator().manual_seed(0)
    q, k, v, behind_k, behind_v = (
        torch.randn(length, heads, 8, generator=generator)
        for length, heads in ((17, 4), (17, 2), (17, 2), (prefix, 2), (prefix, 2))
    )
    sinks = torch.randn(4, generator=generator) if with_sinks else None
    tensors = [q, k, v, behind_k, behind_v, sinks]
    wanted = {"all": tensors, "all but queries": tensors[1:], "the prefix": tensors[3:5]}[moving]
    wanted = [tensor.requires_grad_() for tensor in wanted if tensor is not None]
    how = {"scale": 0.5, "softcap": softcap, "window": window, "sinks": sinks}
    plan, results = plan_tree(blocks, 0, prefix, "cpu"), []
    for attend in (attend_tree_reference, attend_tree):
        saved = SavedBytes(iter(()))
        with saved.counting():
            out = attend(q, k, v, plan, (behind_k, behind_v), **how)
        results.append([out.detach(), *torch.autograd.grad(out.sin().sum(), wanted)])
    assert all(map(torch.equal, *results))
    assert saved.total == sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_cached_prefix_gets_its_gradient():
    block, prefix = Block(5, (0, 3), (-1, 0)), 3
    q, k, v = (torch.randn(8, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    whole = attend_tree(
        q,
        k,
        v,
        plan_tree(
            [
                block,
            ],
            prefix,
            prefix,
            "cpu",
        ),
        scale=1.0,
    )[prefix:]
    cache = (k[:prefix], v[:prefix])
    cached = attend_tree(q[prefix:], k[prefix:], v[prefix:], plan_tree([block], 0, prefix, "cpu"), cache, scale=1.0)
    torch.testing.assert_close(cached, whole, atol=1e-12, rtol=0)
    for ours, theirs in zip(*(torch.autograd.grad(out.sum(), (k, v)) for out in (cached, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_gradcheck():
    rows = [Block(3, (0,), (-1,)), Block(4, (0, 2, 3), (-1, 0, 0))]
    inputs = [torch.randn(9, 2, 3, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend_tree(q, k, v, plan_tree(rows, 2, 2, "cpu"), scale=0.5), inputs
    )


@pytest.fixture(autouse=True)
def usual_worth(monkeypatch):
    monkeypatch.setattr(tree_plan, "WORTH_A_CALL", tree_plan.WORTH_A_CALL)


def test_large_trees_are_cut_into_segments():
    """A passage of 300 tokens with 20 answers of 30: the mask would hide nine tenths of 900 x 900."""
    passage = Block(900, (0, *range(300, 900, 30)), (-1, *[0] * 20))
    plan = plan_tree([Block(7, (0, 5), (-1, 0)), passage], 0, 2, "cpu")
    cover, inner = plan.pieces()
    assert [piece.length for piece in cover] == [7, 300, *[30] * 20]
    assert [piece.masked for piece in cover] == [0, *[None] * 21]
    assert inner == [(slice(307, 907), slice(7, 307))]
    nested = plan_tree([Block(600, (0, 200, 300, 400, 500), (-1, 0, 1, 0, 3))], 0, 2, "cpu")
    assert nested.pieces()[1] == [
        (slice(200, 600), slice(0, 200)), (slice(300, 400), slice(200, 300)), (slice(500, 600), slice(400, 500)),
    ]  # fmt: skip


@pytest.mark.parametrize("worth", [0, 6000])
def test_gradcheck_of_the_merged_function(worth, monkeypatch):
    monkeypatch.setattr(tree_plan, "WORTH_A_CALL", worth)
    rows = [Block(3, (0,), (-1,)), Block(4, (0, 2, 3), (-1, 0, 0))]
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 4, 3), (7, 2, 3), (7, 2, 3), (2, 2, 3), (2, 2, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    plan = plan_tree(rows, 0, 2, "cpu")
    assert torch.autograd.gradcheck(lambda *x: MergedAttention.apply(*x, plan, 0.5), inputs)


def test_merged_is_what_a_cpu_runs(monkeypatch):
    import ptp_ds.attention.tree as tree_attention

    def fail(*_args, **_kwargs):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(tree_attention, "attend_tree_reference", fail)
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    plan, prefix = plan_tree([Block(5, (0, 3), (-1, 0))], 0, 3, "cpu"), (torch.randn(3, 2, 8), torch.randn(3, 2, 8))
    assert attend_tree(q, k, v, plan, prefix, scale=1.0).shape == (5, 4, 8)
    assert attend_tree(q, k, v, plan, prefix, scale=1.0, window=9).shape == (5, 4, 8)  # no path is longer than 8
    with pytest.raises(AssertionError, match="reference"):
        attend_tree(q, k, v, plan, prefix, scale=1.0, window=4)


def test_the_bare_model_says_how_it_must_be_called():
    from ptp_ds.backbone.backbone import Backbone

    backbone = Backbone(make_model("llama"))
    with pytest.raises(ValueError, match="outside a packed pass"):
        backbone.model(input_ids=torch.tensor([[1, 2]]))
