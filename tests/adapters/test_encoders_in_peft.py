"""Encoders' adapters as peft loads them: its logits are our scores, or it refuses what it would compute otherwise."""

import json

import pytest
import torch

from ptp_ds.adapters.card import model_card
from ptp_ds.adapters.read import adapter_kind, read_adapter
from ptp_ds.adapters.write import write_adapter
from ptp_ds.models.heads import HeadPlan
from tests.support.encoders import ENCODERS, make_backbone, make_encoder, make_values
from tests.support.reference import make_examples

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
IN_PEFT = ("bert", "roberta", "xlm-roberta", "electra")  # with a deep prompt


def written(family, kind, prompt, folder):
    """An adapter of random values in `folder`; its prompt and our scores [C] of an example."""
    backbone, example = make_backbone(family, kind, prompt), make_examples("single")[3]
    trained, row = make_values(backbone), backbone.rows.pack([example])
    with torch.no_grad():
        scores = backbone.score(row, backbone.inputs(row, trained), trained)[0, 0]
    values, head = backbone.head.split(trained)
    write_adapter(folder, values, "model", backbone.model.config, {}, prompt, HeadPlan(kind, False, 3), head)
    return values, scores


def peft_scores(family, kind, folder):
    from peft import PeftModel

    example = make_examples("single")[3]
    ids = torch.tensor([[*example.context_ids, *([4, 2] if kind == "masked" else [2])]])
    model = PeftModel.from_pretrained(make_encoder(family, kind), folder).eval()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    if kind == "masked":
        log_probs = logits[len(logits) - 2].log_softmax(-1)
        logits = torch.stack([log_probs[answer[0]] for answer in example.candidate_ids])
    return logits[: len(example.candidate_ids)]


@pytest.mark.parametrize("kind", ["masked", "classes"])
@pytest.mark.parametrize("family", ENCODERS)
def test_deep_prompts(family, kind, tmp_path):
    prompt, scores = written(family, kind, "deep", tmp_path / "adapter")
    assert adapter_kind(tmp_path / "adapter") == "deep"
    if kind == "masked":
        assert torch.equal(read_adapter(tmp_path / "adapter", kind="deep"), prompt)
    if family in IN_PEFT:
        torch.testing.assert_close(peft_scores(family, kind, tmp_path / "adapter"), scores, atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(KeyError, match="PTP_DS_DEEP"):
        peft_scores(family, kind, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "PREFIX_TUNING"}))  # as before 2026-12
    assert adapter_kind(tmp_path / "adapter") == "deep"


@pytest.mark.parametrize("family", [*IN_PEFT, "albert"])
def test_the_card_says_whether_peft_loads_a_deep_prompt(family):
    card = {"head": {"kind": "masked"}, "model": {"family": family}, "result": {"prompt": "deep"}}
    text = model_card("owner/model", card)
    assert ("PeftModel.from_pretrained" in text) == (family in IN_PEFT)
    assert ("which peft doesn't bring into this model's" in text) == (family not in IN_PEFT)
    assert "PeftModel" in model_card("owner/model", {**card, "head": {"kind": "causal"}})
    assert "PeftModel" in model_card("owner/model", {**card, "result": {"prompt": "soft"}})
