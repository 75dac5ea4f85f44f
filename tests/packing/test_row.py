"""Packing: positions, visibility, picks and scores of small rows worked out by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ptp_ds.packing import row as row_module
from ptp_ds.packing.layouts import SeparateRows
from ptp_ds.packing.row import Block, pack, pack_text_twins, shared_start
from ptp_ds.tasks.example import Example


def example(context, candidates, index=0):
    return Example(context_ids=context, movable=[True] * len(context), candidate_ids=candidates, gold=0, index=index)


def test_branches_start_behind_the_context():
    row = pack([example([5, 6, 7], [[1, 2], [3], [4, 8, 9]])])
    assert row.token_ids.tolist() == [5, 6, 7, 1, 4, 8]  # no token for the last one of an answer
    assert row.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert row.movable.tolist() == [True] * 3 + [False] * 3
    assert [places.tolist() for places in row.scored] == [[2, 3, 4, 5]]
    assert row.pick_row.tolist() == [0, 1, 0, 0, 2, 3]
    assert row.pick_token.tolist() == [1, 2, 3, 4, 8, 9]
    assert row.pick_cell.tolist() == [0, 0, 1, 2, 2, 2]


def test_visibility_of_a_nested_tree():
    block = Block(5, (0, 2, 3, 4), (-1, 0, 1, 0))  # 0 1 | 2 under 0 | 3 under 2's segment | 4 under 0
    assert block.depths().tolist() == [0, 1, 2, 3, 2]
    assert block.visible().astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1],
    ]  # fmt: skip


def test_scores_sum_log_probabilities_and_mark_absent_answers():
    row = pack([example([5], [[1, 2], [3]]), example([6], [[0]], index=1)])
    logits = torch.randn(len(row.scored[0]) + len(row.scored[1]), 10, generator=torch.Generator().manual_seed(0))
    log_probs = logits.log_softmax(-1)
    scores = row.scores(logits)
    assert scores.shape == (1, 2, 2)
    torch.testing.assert_close(scores[0, 0], torch.stack([log_probs[0, 1] + log_probs[1, 2], log_probs[0, 3]]))
    torch.testing.assert_close(scores[0, 1, 0], log_probs[2, 0])
    assert scores[0, 1, 1] == float("-inf")


class Names(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scores_are_added_in_one_order(device, monkeypatch):
    """Shapes alone: index_add_ takes any order on a GPU, index_put_ with many values on a CPU."""
    monkeypatch.setattr(row_module, "picked_log_probs", lambda logits, rows, tokens: logits.new_empty(rows.shape))
    monkeypatch.setattr(torch.Tensor, "__invert__", lambda x: x.eq(0))  # the one that asks for a real GPU
    row = pack([example([5], [[1, 2, 3], [3, 4, 5]])] * 20)
    with FakeTensorMode(allow_non_fake_inputs=True), Names() as names:
        logits = torch.empty(sum(map(len, row.scored)), 10, device=device)
        row.mapped(lambda x: torch.empty_like(x, device=device)).scores(logits)
    added = [name for name in names.called if name.startswith(("index_add", "index_put", "_index_put", "scatter_add"))]
    assert added == [{"cpu": "index_add_", "cuda": "index_put_"}[device]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_scores_on_a_gpu_are_the_same_in_every_run():
    row = pack([example([5], [list(range(9))] * 8)] * 40).to("cuda")
    logits = torch.randn(sum(map(len, row.scored)), 10, generator=torch.Generator().manual_seed(0)).cuda()
    found = [row.scores(logits) for _ in range(20)]
    assert all(torch.equal(one, found[0]) for one in found)


def test_twin_doubles_streams():
    row = pack([example([5, 6], [[1, 2], [3]])])
    both = row.with_twin(row)
    assert (both.streams, both.num_tokens, both.num_examples) == (2, 2 * row.num_tokens, 1)
    logits = torch.randn(2 * len(row.scored[0]), 10)
    scores = both.scores(logits)
    torch.testing.assert_close(scores[0], row.scores(logits[: len(row.scored[0])])[0])
    torch.testing.assert_close(scores[1], row.scores(logits[len(row.scored[0]) :])[0])


def still(context, count):
    movable = [False] * count + [True] * (len(context) - count)
    return Example(context_ids=context, movable=movable, candidate_ids=[[1], [2, 3]], gold=0, index=0)


def test_what_all_contexts_begin_with():
    assert shared_start([still([5, 6, 7, 8], 3), still([5, 6, 9], 3)]) == 2
    assert shared_start([still([5, 6, 7, 8], 1), still([5, 6, 7], 2)]) == 1  # the second token may move
    assert shared_start([still([5, 6], 2), still([5, 6], 2)]) == 1  # the last one is scored
    assert shared_start([still([5], 1), still([5, 6], 2)]) == 0
    row = pack([still([5, 6, 7, 8], 3), still([5, 6, 9], 3)], 2)
    assert row.shared_ids.tolist() == [5, 6]
    assert row.token_ids.tolist() == [7, 8, 2, 9, 2]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="same 3 tokens"):
        pack([still([5, 6, 7, 8], 3), still([5, 6, 9], 3)], 3)


def test_lengths_of_an_example():
    one = example([5, 6, 7], [[1, 2], [3], [4, 8, 9]])
    assert (one.packed_length, one.path_length) == (6, 5)


@pytest.mark.parametrize(
    ("rows", "said"),
    [([], "Can't pack an empty batch"), ([example([], [[1]])], "has an empty context or candidate"),
     ([example([1], [[]])], "has an empty context or candidate")],
)  # fmt: skip
def test_empty_rows_are_refused(rows, said):
    separate = SeparateRows(kind="causal", prompt_length=2)
    for packs in (pack, separate.pack, lambda given: separate.pack_twins(given, [one.context_ids for one in given])):
        with pytest.raises(ValueError, match=said):
            packs(rows)


def test_text_twins_share_what_lies_before_the_first_change():
    row = pack_text_twins([example([5, 6, 7, 8], [[1, 2], [3]])], [[5, 6, 9, 8, 4]])
    assert row.streams == 2
    assert row.token_ids.tolist() == [5, 6, 7, 8, 1, 9, 8, 4, 1]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert row.blocks == (Block(9, (0, 2, 4, 5, 8), (-1, 0, 1, 0, 3)),)
    assert [places.tolist() for places in row.scored] == [[3, 4, 7, 8]]
    assert row.pick_cell.tolist() == [0, 0, 1, 2, 2, 3]


def test_a_twin_without_a_change_is_not_computed_at_all():
    row = pack_text_twins([example([5, 6], [[1], [2]])], [[5, 6]])
    assert row.token_ids.tolist() == [5, 6]
    assert [places.tolist() for places in row.scored] == [[1]]
    scores = row.scores(torch.randn(1, 10, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(scores[0], scores[1])


def test_twins_that_share_nothing():
    row = pack_text_twins([example([5, 6], [[1], [2]])], [[7, 6, 6]])
    assert row.blocks == (Block(5, (0, 2), (-1, -1)),)
    assert row.position_ids.tolist() == [0, 1, 0, 1, 2]


def test_each_example_needs_a_twin():
    with pytest.raises(ValueError, match="needs one twin"):
        pack_text_twins([example([5], [[1]])], [])
    with pytest.raises(ValueError, match="needs one twin"):
        pack_text_twins([example([5], [[1]])], [[]])
