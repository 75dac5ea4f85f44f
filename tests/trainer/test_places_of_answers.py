"""Where ptp_loss reads predictions: in masked models and token classifiers where an answer stands, however wrapped."""

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForMaskedLM, AutoModelForTokenClassification, BertForMaskedLM

from ptp_ds.errors import UserError
from ptp_ds.trainer import PTPSettings
from ptp_ds.trainer.loss import answers_in_place, base_of, is_token_classifier, movable_tokens
from tests.support.own_loop import ptp_loss
from tests.support.reference import make_examples, make_model
from tests.trainer.test_ptp_loss import batch_of, encoder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's and torch's


class OurBert(BertForMaskedLM):
    """A subclass with a name of its own, as FSDP2 makes them, too."""


class Wrapped(nn.Module):
    """A wrapper as DDP is one."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, **batch):
        return self.module(**batch)


def compiled(model):
    return torch.compile(model, backend="eager")


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))


@pytest.mark.parametrize(
    "wrap",
    [
        compiled, Wrapped, lora, lambda model: Wrapped(compiled(model)), lambda model: compiled(Wrapped(lora(model))),
        lambda model: lora(compiled(model)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ours", [False, True])
def test_a_masked_model_is_known_under_its_wrappers(ours, wrap):
    model = encoder(AutoModelForMaskedLM)
    model = OurBert(model.config) if ours else model
    assert answers_in_place(wrap(model))
    assert base_of(wrap(model)) is model
    causal = make_model("llama")
    assert not answers_in_place(Wrapped(compiled(causal)))
    assert not is_token_classifier(wrap(model))


@pytest.mark.parametrize("wrap", [pytest.param(compiled, marks=pytest.mark.slow), lambda model: model])
def test_a_wrapped_masked_models_loss_is_read_at_the_answer(wrap):
    model = encoder(AutoModelForMaskedLM)
    batch, _, movable = batch_of(make_examples("single"))
    rows, columns = (batch["labels"] != -100).nonzero(as_tuple=True)
    answer_ids = torch.stack([batch["labels"][rows, columns], (batch["labels"][rows, columns] + 1) % 96], -1)
    found = ptp_loss(wrap(model), batch, PTPSettings(sigma=0.5), movable=movable, answer_ids=answer_ids)
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**given).logits[rows, columns].gather(1, answer_ids)
    wanted = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    assert float(found.cross_entropy) == pytest.approx(float(wanted), rel=1e-5)


def test_a_token_classifiers_words_move_and_are_read_where_they_stand():
    """Every word has a class; by hand, the divergence at each from two plain forwards."""
    model = encoder(AutoModelForTokenClassification, num_labels=3, sep_token_id=7)
    ids = torch.tensor([[5, 6, 9, 7, 0], [8, 11, 12, 10, 7]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    batch["labels"] = torch.where((ids == 0) | (ids == 7), -100, ids % 3)
    movable = (ids != 0) & (ids != 7)
    assert torch.equal(movable_tokens(model, batch), movable)
    settings = PTPSettings(perturbation="mask", mask_token_id=4, mask_share=0.3)
    found = ptp_loss(model, batch, settings)
    from ptp_ds.trainer.deltas import masked_ids

    hidden = masked_ids(ids, movable, torch.arange(2), settings, 0)
    assert int((hidden != ids).sum()) == 2
    p, q = (
        model(input_ids=given, attention_mask=batch["attention_mask"]).logits[movable].log_softmax(-1)
        for given in (ids, hidden)
    )
    assert float(found.divergence) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert float(found.cross_entropy) == pytest.approx(float(F.nll_loss(p, batch["labels"][movable])), rel=1e-5)
    moved = ptp_loss(model, batch, PTPSettings(sigma=0.5))
    assert float(moved.divergence) > 1e-4
    assert float(moved.delta_norm) > 0


def test_what_has_no_place_is_one_sentence():
    model = encoder(AutoModelForTokenClassification, num_labels=3)
    ids = torch.tensor([[5, 6, 9]])
    with pytest.raises(UserError, match="a token classifier's answers are its classes"):
        ptp_loss(model, {"input_ids": ids, "labels": ids % 3}, PTPSettings(), answer_ids=torch.tensor([1, 2]))
    with pytest.raises(UserError, match="A batch needs input_ids and labels to be perturbed"):
        ptp_loss(model, {"input_ids": ids}, PTPSettings())
