"""The GPU's attention on a CPU: its parts and their joining, the kernels played by plain loops, and its self-test."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from ptp_ds.attention import flash as flash_attention
from ptp_ds.attention.flash import FlashTreeAttention, flash_attend, largest_error, parts_of, prefix_part, try_flash
from ptp_ds.attention.plan import plan_forest
from ptp_ds.attention.tree import attend_reference
from ptp_ds.packing.transfer import moved
from tests.support.played_flash import play_backward, play_forward
from tests.support.trees import packed_rows


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(flash_attention, "flash_forward", play_forward)
    monkeypatch.setattr(flash_attention, "flash_backward", play_backward)


@given(
    trees=st.lists(packed_rows, min_size=1, max_size=3), prefix=st.integers(1, 4), groups=st.sampled_from([1, 3]),
    run=st.sampled_from([3, 1024]), seed=st.integers(0, 99),
)  # fmt: skip
def test_joined_parts_equal_the_reference(trees, prefix, groups, run, seed):
    """One prefix under all rows; or a forest, its prefixes in any order, some twice, one under none."""
    lengths = [prefix] if len(trees) == 1 else [prefix, 5, 1 + seed % 3]
    numbers = [0] if len(trees) == 1 else torch.randint(3, (len(trees),), generator=torch.manual_seed(seed)).tolist()
    rows = [block for tree in trees for block in tree]
    assume(len({block.causal for block in rows}) == 1)
    runs = list(zip(numbers, trees, strict=True))
    prefix = sum(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attention, "flash_forward", play_forward)
        patch.setattr(flash_attention, "flash_backward", play_backward)
        patch.setattr(flash_attention, "_PREFIX_RUN", run)
        patch.setattr(torch, "float32", torch.float64)  # sums, too, in double precision
        generator, tokens = torch.Generator().manual_seed(seed), sum(block.length for block in rows)
        shapes = [(tokens, 2 * groups, 4), (tokens, 2, 4), (tokens, 2, 4), (prefix, 2, 4), (prefix, 2, 4)]
        leaves = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
        weight = torch.randn(shapes[0], dtype=torch.float64, generator=generator)
        sides = []
        for attend in (flash_attend, attend_reference):
            out = attend(*leaves[:3], plan_forest(runs, lengths, "cpu"), (leaves[3], leaves[4]), 0.5)
            sides.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
        for ours, wanted in zip(*sides, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-6)


def test_a_nested_tree_has_a_part_for_each_distance():
    rows = [flash_attention.Block(9, (0, 2, 5), (-1, 0, 1)), flash_attention.Block(4, (0, 2, 3), (-1, 0, 0))]
    own, parents, grandparents = parts_of(rows)
    assert own.queries is None
    assert own.causal
    assert own.cu_q.tolist() == [0, 2, 5, 9, 11, 12, 13]
    assert parents.queries.tolist() == [2, 3, 4, 5, 6, 7, 8, 11, 12]
    assert parents.keys.tolist() == [0, 1, 2, 3, 4, 9, 10]  # a parent once, whatever the number of its children
    assert (parents.cu_q.tolist(), parents.cu_k.tolist()) == ([0, 3, 7, 9], [0, 2, 5, 7])
    assert grandparents.queries.tolist() == [5, 6, 7, 8]
    assert grandparents.keys.tolist() == [0, 1]


def test_the_kernels_take_the_arguments_they_are_given():
    """Shapes alone: on the meta device, half precision, the operators' own checks of their arguments run."""
    rows, meta = [flash_attention.Block(6, (0, 3, 5), (-1, 0, 0))], torch.device("meta")
    shapes = [(6, 4, 64), (6, 2, 64), (6, 2, 64), (5, 2, 64), (5, 2, 64)]
    leaves = [torch.empty(shape, dtype=torch.bfloat16, device=meta).requires_grad_() for shape in shapes]
    parts = [moved(part, meta) for part in (prefix_part([6], [0], [5]), *parts_of(rows))]
    out = FlashTreeAttention.apply(*leaves, parts, 0.125)
    found = torch.autograd.grad(out.sum(), leaves)
    assert [gradient.shape for gradient in found] == [leaf.shape for leaf in leaves]
    assert {gradient.dtype for gradient in (out, *found)} == {torch.bfloat16}


class Orders(TorchDispatchMode):
    """Whether torch was asked for the same bits in every run, and for filled memory, at each flash backward."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_flash_attention_backward":
            self.seen.append((torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [0, 1])
def test_a_backward_adds_in_one_order_and_leaves_the_programs_choice(mode):
    """A program's "warn" would not do: the kernel then warns and adds in any order."""
    meta, torchs_own = torch.device("meta"), (torch.get_deterministic_debug_mode(), True)
    q, k, v = (torch.empty(6, 2, 64, dtype=torch.bfloat16, device=meta) for _ in range(3))
    lse, (part,) = torch.empty(2, 6, device=meta), parts_of([flash_attention.Block(6, (0,), (-1,))])
    torch.set_deterministic_debug_mode(mode)
    try:
        with Orders() as orders:
            flash_attention.flash_backward(q, q, k, v, q, lse, moved(part, meta), 0.125)
        after = torch.get_deterministic_debug_mode(), deterministic.fill_uninitialized_memory
    finally:
        torch.set_deterministic_debug_mode(torchs_own[0])
    assert (orders.seen, after) == ([(2, False)], (mode, True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_long_rows_have_the_same_gradients_in_every_run():
    """Many runs of keys add to a query's gradient; short rows have one, and any order is the same."""
    rows, generator = [flash_attention.Block(2000, (0, 900), (-1, 0))], torch.Generator().manual_seed(0)
    shapes = [(2000, 4, 64), (2000, 2, 64), (2000, 2, 64), (700, 2, 64), (700, 2, 64)]
    leaves = [torch.randn(s, generator=generator).to("cuda", torch.bfloat16).requires_grad_() for s in shapes]
    parts = [moved(part, torch.device("cuda")) for part in (prefix_part([2000], [0], [700]), *parts_of(rows))]
    found = []
    for _ in range(10):
        out = FlashTreeAttention.apply(*leaves, parts, 0.125)
        found.append(torch.autograd.grad(out.float().cos().sum(), leaves))
    assert all(torch.equal(one, first) for run in found for one, first in zip(run, found[0], strict=True))


def test_the_self_test_passes_right_kernels_and_finds_wrong_ones(played, monkeypatch):
    cpu = torch.device("cpu")
    assert largest_error(cpu, torch.float64, attend_reference) < 1e-5
    monkeypatch.setattr(flash_attention, "flash_backward", lambda *args: play_backward(*args[:-1], 1.0))
    assert largest_error(cpu, torch.float64, attend_reference) > 0.1


@pytest.mark.parametrize("worst", [0.5, float("nan"), RuntimeError("no kernel image")])
def test_kernels_that_cannot_be_used_are_left_out_aloud(worst, monkeypatch, capsys):
    def error(*_):
        if isinstance(worst, Exception):
            raise worst
        return worst

    monkeypatch.setattr(flash_attention, "_proven", {})
    monkeypatch.setattr(flash_attention, "largest_error", error)
    device = torch.device("cuda", 0)
    try_flash(device, torch.bfloat16, attend_reference)
    try_flash(device, torch.bfloat16, attend_reference)
    assert flash_attention._proven == {(device, torch.bfloat16): False}
    assert capsys.readouterr().err.count("attention takes the slower reference") == 1
