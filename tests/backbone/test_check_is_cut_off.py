"""A start-up check that is cut off, by full memory or a lost rank, says nothing of the family that it looked at."""

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import checked_backbone
from tests.support.reference import make_model

CUT_OFF = {
    "a GPU's memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "a lost rank": RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:33731"),
}


def failing_at(call, error):
    """A model whose first layer fails so at its call of this number, and its calls so far."""
    model, calls = make_model("llama"), []

    def count(*_):
        calls.append(len(calls))
        if calls[-1] == call:
            raise error

    model.model.layers[0].register_forward_pre_hook(count)
    return Backbone(model, joint=True), calls


@pytest.mark.parametrize("cause", CUT_OFF)
def test_its_error_passes_wherever_it_comes_from(cause):
    """At every forward of the check: products being joined, packed and plain passes, the head's trials."""
    error = CUT_OFF[cause]
    backbone, calls = failing_at(-1, error)
    assert checked_backbone(backbone)[1] is None
    assert len(calls) > 10
    for call in calls[:]:
        with pytest.raises(type(error)) as raised:
            checked_backbone(failing_at(call, error)[0])
        assert raised.value is error, call


def test_any_other_error_is_the_familys():
    """It takes the generic path, with what its layers said as the reason."""
    backbone, reason = checked_backbone(failing_at(3, RuntimeError("no such mask"))[0])
    assert not backbone.packs
    assert "RuntimeError: no such mask" in str(reason)
