"""transformers' masks: none is made in a pass, which would wait for the device; the start-up check sees them."""

import pytest
import torch
from transformers import masking_utils

from ptp_ds.attention.interface import masks_seen
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from tests.support.packed import make_prompt
from tests.support.reference import make_examples, make_model


@pytest.fixture
def read(monkeypatch):
    """One entry for each time that transformers has looked at the positions."""
    times, own = [], masking_utils.find_packed_sequence_indices

    def observed(position_ids):
        times.append(position_ids.shape)
        return own(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", observed)
    return times


def score(backbone):
    prompt, row = make_prompt(), backbone.rows.pack(make_examples("multi"))
    return backbone.score(row, backbone.inputs(row, prompt), prompt)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_no_pass_reads_positions(family, read):
    backbone = Backbone(make_model(family))
    check_backbone(backbone, 64)
    assert read, "the check's pass asks for masks"
    read.clear()
    scores = score(backbone)
    assert not read
    with masks_seen(backbone.model) as windows:
        assert torch.equal(score(backbone), scores), "masks are asked for, and none is used"
    assert read
    assert windows == ({6} if family in ("mistral", "gemma2") else set())


def test_an_error_inside_leaves_the_model_without_masks(read):
    backbone = Backbone(make_model("llama"))
    with pytest.raises(KeyError), masks_seen(backbone.model):
        raise KeyError
    score(backbone)
    assert not read
