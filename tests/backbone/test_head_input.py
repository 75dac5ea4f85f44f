"""What the start-up check lets a causal head see: scored tokens alone where that proves the same, else the row."""

import pytest

from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.packing.row import pack
from tests.support.packed import make_prompt
from tests.support.reference import make_examples, make_model


@pytest.mark.parametrize(("family", "head_input"), [("llama", "scored"), ("gemma2", "scored"), ("gpt2", "row")])
def test_the_head_sees_scored_tokens_alone_where_that_is_the_same(family, head_input):
    """gpt2 brings what its layers give into its input's shape. Widths of the final norm's and the head's inputs."""
    backbone, seen = Backbone(make_model(family), Activations()), {}
    check_backbone(backbone)
    assert backbone.head_input == head_input
    norm, head = backbone.model.base_model.norm if family != "gpt2" else backbone.model.base_model.ln_f, backbone.output
    norm.register_forward_hook(lambda module, given, out: seen.update(norm=given[0].shape[1]))
    head.register_forward_hook(lambda module, given, out: seen.update(head=given[0].shape[1]))
    row, prompt = pack(make_examples("ragged")), make_prompt()
    backbone.score(row, backbone.inputs(row, prompt), prompt)
    scored = sum(map(len, row.scored))
    assert seen == {"norm": scored if head_input == "scored" else 5 + row.num_tokens, "head": scored}


def test_a_head_that_gives_something_else_for_scored_tokens_alone_gets_the_row(monkeypatch):
    """Here one whose scores depend on how many tokens it is given, by less than a start-up check's own bound."""
    real = Backbone.run

    def run(self, layer_pass, *args, **given):
        logits = real(self, layer_pass, *args, **given)
        return logits * 1.0001 if layer_pass.head_input == "scored" else logits

    monkeypatch.setattr(Backbone, "run", run)
    backbone = Backbone(make_model("llama"), Activations())
    check_backbone(backbone)
    assert backbone.head_input == "row"
