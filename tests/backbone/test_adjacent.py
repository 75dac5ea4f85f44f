"""Parameters one behind the other: where they are taken as one, and moved without a second copy."""

import weakref

import torch
from torch import nn

from ptp_ds.backbone.adjacent import joined, lay_together

WIDE = 8


def test_tensors_are_joined_where_they_lie_one_behind_the_other_alone():
    memory = torch.arange(24.0)
    one, two, three = memory[:8].view(2, 4), memory[8:20].view(3, 4), memory[20:].view(1, 4)
    found = joined([one, two, three])
    assert torch.equal(found, memory.view(6, 4))
    assert found.data_ptr() == memory.data_ptr()
    assert joined([one, three]) is None
    assert joined([two, one]) is None
    assert joined([one, memory[8:20].view(2, 6)]) is None
    assert joined([one, memory[8:12].view(1, 2, 2).expand(1, 2, 2)]) is None
    assert joined([one[:, :2], two]) is None
    assert joined([torch.empty(0, 4), torch.empty(0, 4)]) is None


def test_moving_weights_together_keeps_one_copy():
    layers = [nn.Linear(WIDE, size) for size in (4, 6)]
    before = [layer.weight.detach().clone() for layer in layers]
    old = [weakref.ref(layer.weight.data.untyped_storage()) for layer in layers]
    assert lay_together([layer.weight for layer in layers])
    assert all(torch.equal(layer.weight, wanted) for layer, wanted in zip(layers, before, strict=True))
    assert len({layer.weight.untyped_storage().data_ptr() for layer in layers}) == 1
    assert layers[0].weight.untyped_storage().nbytes() == 10 * WIDE * 4
    assert all(memory() is None for memory in old)
    place = layers[0].weight.data_ptr()
    assert lay_together([layer.weight for layer in layers]), "they lie so already"
    assert layers[0].weight.data_ptr() == place
