"""How far the start-up check lets scores lie apart, and what it says of a family that has to be padded."""

import dataclasses

import pytest

from ptp_ds.backbone import check
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone, checked_backbone
from tests.backbone.test_check import SIZES, build
from tests.support.reference import make_model


@pytest.mark.parametrize(("digits", "served"), [(1, True), (40, False)])
def test_a_model_that_knows_little_of_many_words_may_be_off_by_its_scores_last_digit(monkeypatch, digits, served):
    """A model of small weights tells 50,000 words hardly apart: its scores are -10.8 and differ by hundredths, of which
    their last digit is a 100,000th part. Forty of them are no rounding.
    """
    real = check.packed_pass

    def off(*given):
        found, local = real(*given)
        return dataclasses.replace(found, scores=found.scores * (1 + digits * 2.0**-23)), local

    monkeypatch.setattr(check, "packed_pass", off)
    backbone = Backbone(build("LlamaForCausalLM", "LlamaConfig", 0.005, **{**SIZES, "vocab_size": 50_000}))
    if served:
        check_backbone(backbone)
        return
    with pytest.raises(ValueError, match="packed scores differ from plain ones"):
        check_backbone(backbone)


def test_a_sharded_family_of_the_generic_path_is_told_the_flag(monkeypatch):
    """Under ZeRO-3, the default: what it needs comes first, and the reason is all that is left of the refusal."""
    backbone = Backbone(make_model("falcon"))
    monkeypatch.setattr(type(backbone.shards), "sharded", True)
    whole = "Model family 'falcon' can't be packed, so it needs the whole model on each rank: give --ds_config zero2 ("
    with pytest.raises(ValueError, match="can't be packed") as error:
        checked_backbone(backbone)
    said = str(error.value)
    assert said.startswith(whole)
    assert said.endswith(").")
    assert "can't be served" not in said
    assert "Use one that" not in said
