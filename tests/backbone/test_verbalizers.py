"""Logits of the verbalizers alone: what the whole vocabulary's product has there, and the step that stays the same."""

import pytest
import torch
from torch import nn

from ptp_ds.backbone import verbalizers
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack
from ptp_ds.perturb import Noise
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.reference import FAMILIES, make_examples, make_model, relative_error


def make_prompt() -> torch.Tensor:
    return (0.3 * torch.randn(5, 32, generator=torch.Generator().manual_seed(1))).requires_grad_()


def loss_and_gradient(backbone, prompt, perturbation):
    run = RunConfig(perturbation=perturbation, epsilon=0.5, sigma=0.5, mask_share=0.5)
    row = pack(make_examples("single"))
    loss = ptp_loss(prompt, backbone, row, run, settings_of(run, 1.0, 3), Noise(3, 4))
    return loss.total.item(), torch.autograd.grad(loss.total, prompt)[0]


@pytest.mark.parametrize("perturbation", ["none", "gaussian", "pgd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_the_same_without_the_rest_of_the_vocabulary(family, perturbation, monkeypatch):
    backbone, prompt = Backbone(make_model(family, torch.float64)), make_prompt()
    asked = []
    whole = verbalizers.use_columns
    monkeypatch.setattr(verbalizers, "use_columns", lambda columns: (asked.append(columns), whole(columns))[1])
    wide = loss_and_gradient(backbone, prompt, perturbation)
    assert asked == [None] * len(asked)
    asked.clear()
    check_backbone(backbone)
    assert backbone.narrows
    asked.clear()
    narrow = loss_and_gradient(backbone, prompt, perturbation)
    assert all(columns is not None and len(columns) < 96 for columns in asked)
    assert narrow[0] == pytest.approx(wide[0], abs=1e-12)
    assert relative_error(narrow[1], wide[1]) < 1e-10


def test_longer_answers_need_the_whole_vocabulary():
    row = pack(make_examples("multi"))
    assert row.verbalizers is None
    backbone = Backbone(make_model("llama"))
    check_backbone(backbone)
    assert backbone.narrow(row) is row


def test_a_head_with_more_behind_it_is_not_narrowed():
    """A bias of the vocabulary's size behind the product can't be cut from outside."""
    model = make_model("llama")
    bias = torch.randn(96)
    model.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    backbone = Backbone(model)
    check_backbone(backbone)
    assert not backbone.narrows


def test_a_head_that_is_no_linear_layer_is_left_alone():
    class Odd(nn.Linear):
        pass

    model = make_model("llama")
    model.lm_head = Odd(32, 96)
    assert Backbone(model).output is None


def test_release_gives_the_head_back():
    model = make_model("llama")
    Backbone(model, kernels="torch").release()
    assert "forward" not in vars(model.lm_head)
    columns, x = torch.tensor([3, 5]), torch.randn(2, 32)
    backbone = Backbone(model)
    with verbalizers.use_columns(columns):
        assert model.lm_head(x).shape == (2, 2)
        backbone.release()
        assert model.lm_head(x).shape == (2, 96)
