"""Rows and plans on another device: every tensor goes, shapes and dtypes stay; the pinned copy itself is counted in
tests/training/test_counts.py."""

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor

from ptp_ds.attention.flash import add_parts
from ptp_ds.backbone.trunks import plan_row
from ptp_ds.packing import transfer
from ptp_ds.packing.forest import join_rows
from ptp_ds.packing.row import pack, pack_text_twins
from ptp_ds.packing.transfer import moved, to_device
from tests.support.reference import make_examples

META = torch.device("meta")


def tensors_in(value, path=""):
    """(path, tensor) of every tensor below a value, whatever holds it."""
    if isinstance(value, Tensor):
        yield path, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from tensors_in(item, f"{path}[{number}]")


def rows():
    examples = make_examples("multi")
    twins = pack_text_twins(examples, [[*example.context_ids, 5] for example in examples])
    return {"clean": pack(examples), "twins": twins, "joined": join_rows([pack(examples), pack(examples[:2])], [4, 3])}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("name", rows())
def test_every_tensor_goes(name, flash):
    row = rows()[name]
    plan = plan_row(row, (4, 3) if name == "joined" else (4,), 40, flash=flash)
    for here in (row, plan):
        assert moved(here, "cpu") is here
        there = moved(here, META)
        pairs = list(zip(tensors_in(here), tensors_in(there), strict=True))
        assert len(pairs) >= 11
        for (path, old), (same, new) in pairs:
            assert (path, old.shape, old.dtype) == (same, new.shape, new.dtype)
            stays = flash and ".plan." in path and ".buckets" in path  # parts serve in their place
            assert new.device.type == ("cpu" if stays and "prefix" not in path else "meta"), path
        if here is plan:
            assert all(chunk.plan.every_token_asks and not chunk.last_plan.every_token_asks for chunk in there.chunks
                       if name != "joined")  # fmt: skip


def test_buckets_follow_where_the_reference_needs_them():
    """A layer with a soft cap or a window attends without the parts."""
    plan = plan_row(pack(make_examples("multi")), (4,), 2048).chunks[0].plan
    wanted = plan.mask(0, torch.float32, 1, 3)
    add_parts(plan)
    there = moved(plan, META)
    assert there.buckets[0].visible.device.type == "cpu"
    assert there.mask(0, torch.float32, 1, 3).shape == wanted.shape
    assert there.buckets[0].visible.device.type == "meta"


def test_a_row_whose_tokens_were_asked_for_moves_too():
    """What a row remembers of itself is no field of it."""
    row = pack(make_examples("single"))
    assert row.input_ids is row.token_ids
    assert row.places.tokens == row.num_tokens
    assert row.to(META).input_ids.device == META


def test_one_buffer_holds_them_all(monkeypatch):
    """Every shape and dtype, empty ones and views that aren't contiguous."""
    given = [torch.arange(3), torch.tensor([True, False, True]), torch.empty(0, dtype=torch.int64),
             torch.randn(3, 5).T, torch.arange(5, dtype=torch.int32), torch.tensor(7)]  # fmt: skip
    memory, empty = [], torch.empty

    def unpinned(*shape, pin_memory=False, **how):
        memory.append(empty(*shape, **how))
        assert pin_memory
        return memory[-1]

    class Elsewhere:
        """A device that isn't the host's, to which a tensor goes by staying."""

        type = "elsewhere"

    monkeypatch.setattr(transfer.torch, "empty", unpinned)
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: self if non_blocking else None)
    found = to_device(given, Elsewhere())
    assert len(memory) == 1
    for old, new in zip(given, found, strict=True):
        assert torch.equal(old, new)
        assert old.dtype == new.dtype
        assert not new.numel() or new.untyped_storage().data_ptr() == memory[0].untyped_storage().data_ptr()
