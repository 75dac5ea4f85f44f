"""cuDNN's attention isn't offered inside our passes, nor taken from anybody else: what torch may choose from, asked at
every call."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ptp_ds.attention.backends import without_cudnn
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.padded import PaddedBackbone
from ptp_ds.models.heads import Head
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.perturb import Noise
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.packed import make_prompt, symmetric_run
from tests.support.reference import REFUSED, make_examples, make_model
from tests.support.seq2seq import make_seq2seq


@pytest.fixture
def allowed(monkeypatch):
    """(cuDNN, memory-efficient, flash) at every call of scaled_dot_product_attention, by anybody."""
    seen, own = [], F.scaled_dot_product_attention

    def observed(*args, **kwargs):
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.flash_sdp_enabled()))
        return own(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", observed)
    return seen


def step(backbone):
    run, prompt = symmetric_run("pgd"), make_prompt().requires_grad_()
    row = backbone.rows.pack(make_examples("multi"))
    ptp_loss(prompt, backbone, row, run, settings_of(run, 1.0), Noise(3, 4)).total.backward()


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_packed_passes(mode, allowed):
    step(Backbone(make_model("llama"), Activations(mode)))
    assert len(allowed) > 4, "the last layer's scored positions, in every pass"
    assert set(allowed) == {(False, True, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()


def make_falcon():
    config = AutoConfig.for_model("falcon", **REFUSED["falcon"])
    backbone = PaddedBackbone(Backbone(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()))
    backbone.serve("soft", TreeRows(), 5)
    return backbone


def make_bart():
    backbone = PaddedBackbone(Backbone(make_seq2seq("bart"), head=Head("seq2seq")))
    backbone.serve("soft", SeparateRows(kind="seq2seq", prompt_length=5, tail=(1,)))
    return backbone


@pytest.mark.parametrize("make", [make_falcon, make_bart])
def test_padded_passes(make, allowed):
    """The family's own attention, whose shapes are new at each step, too."""
    step(make())
    assert {seen[0] for seen in allowed} == {False}
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_what_was_allowed_before_is_allowed_afterwards(before):
    """Behind an error, too; kernels that somebody has switched off stay off."""
    cuda = torch.backends.cuda
    cuda.enable_cudnn_sdp(before)
    cuda.enable_flash_sdp(False)
    try:
        with suppress(KeyError), without_cudnn():
            assert (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()) == (False, False)
            raise KeyError
        assert (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()) == (before, False)
    finally:
        cuda.enable_cudnn_sdp(True)
        cuda.enable_flash_sdp(True)
