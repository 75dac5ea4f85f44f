"""Soft prompts are as wide as the token embeddings that they stand among."""

import pytest
from sweep_models import Recipe, make_config, make_model

from ptp_ds.backbone import check
from ptp_ds.backbone.backbone import Backbone, FamilyError
from ptp_ds.backbone.check import checked_backbone
from ptp_ds.prompts import prompt_width
from tests.support.reference import make_model as make_reference

PROJECTED = [
    ("albert", "masked"), ("electra", "classes"), ("mobilebert", "masked"), ("opt+post_norm", "causal"),
    ("rembert", "causal"), ("rembert", "masked"), ("rembert", "classes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), PROJECTED)
def test_the_width_of_families_whose_embeddings_are_projected(name, kind):
    config = make_config(name, kind)
    width = make_model(Recipe(config, kind), eager=False).get_input_embeddings().embedding_dim
    assert prompt_width("soft", config) == width != config.hidden_size


def test_a_width_that_is_not_the_embeddings_is_refused_at_the_start(monkeypatch):
    """Of a family that names it as none did before: its prompt couldn't be filled."""
    monkeypatch.setattr(check, "embedding_width", lambda config: 48)
    with pytest.raises(FamilyError, match=r"have 32 numbers, and its config\.json is read as saying 48\. Use"):
        checked_backbone(Backbone(make_reference("llama")))
