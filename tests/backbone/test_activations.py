"""What layers keep for backward: as many as fit, counted in what autograd saves."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from ptp_ds.backbone.activations import Activations, SavedBytes, kept_layers
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.packing.row import pack
from ptp_ds.tasks.example import Example
from tests.support.packed import make_prompt
from tests.support.reference import make_examples

LAYERS = 8


def make_backbone() -> Backbone:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attn_implementation="eager",
    )  # fmt: skip
    return Backbone(LlamaForCausalLM(config))


def saved_by(backbone: Backbone, activations: Activations) -> tuple[int, int, torch.Tensor]:
    """(bytes that autograd saves in a pass, its tokens, the prompt's gradient)."""
    backbone.activations = activations
    row, prompt = pack(make_examples("single")), make_prompt().requires_grad_()
    saved = SavedBytes(backbone.parameters())
    with saved.counting():
        scores = backbone.score(row, backbone.inputs(row, prompt), prompt)[0]
    gradient = torch.autograd.grad(scores.log_softmax(-1)[:, 0].sum(), prompt)[0]
    return saved.total, prompt.shape[0] + row.num_tokens, gradient


def test_as_many_layers_are_kept_as_fit_into_the_budget():
    """Bytes rise evenly with each layer that is kept, from recompute's to keep's, and stay within the budget."""
    backbone = make_backbone()
    everything, tokens, exact = saved_by(backbone, Activations("keep"))
    least, _, _ = saved_by(backbone, Activations("recompute"))
    found = []
    for budget in range(least, everything + 1, (everything - least) // (2 * LAYERS)):
        per_token = {"bytes_per_token": everything / tokens, "input_bytes": least / tokens / LAYERS}
        given = Activations("auto", budget_bytes=float(budget), **per_token)
        total, _, gradient = saved_by(backbone, given)
        assert total <= budget
        torch.testing.assert_close(gradient, exact)
        found.append((LAYERS - given.recomputed(tokens, LAYERS), total))
    assert {kept for kept, _ in found} >= set(range(1, LAYERS))
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(0.0, 0), (79.9, 0), (80.0, 0), (89.9, 0), (90.0, 1), (129.9, 4), (159.9, 7), (160.0, 8), (1e9, 8)],
)
def test_layers_that_fit(budget, kept):
    """10 tokens, 8 layers, each of 2 bytes a token where it is kept, its input 1: 160 bytes kept, 80 recomputed."""
    assert kept_layers(10, 8, 16.0, 1.0, budget) == kept


def test_modes():
    assert Activations("keep").recomputed(10**9, 8) == 0
    assert Activations("recompute").recomputed(1, 8) == 8
    assert Activations("auto").recomputed(10**9, 8) == 0  # nothing is known of what it costs
    assert Activations("auto", bytes_per_token=16.0, input_bytes=2.0, budget_bytes=1.0).recomputed(10, 8) == 8


WIDE = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 16,
        "max_position_embeddings": 2048, "pad_token_id": None}  # fmt: skip
LONG_ROWS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, num_key_value_heads=2, intermediate_size=128)),
    "soft caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**WIDE, num_key_value_heads=4, intermediate_size=128, sliding_window=1024)),
    "sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**WIDE, num_key_value_heads=2, intermediate_size=64, sliding_window=128, num_local_experts=2,
                     num_experts_per_tok=1)),
}  # fmt: skip


@pytest.mark.parametrize("family", LONG_ROWS)
def test_a_token_of_a_long_row_costs_what_the_check_finds_on_short_ones(family):
    """800 tokens behind each other against the check's few: what is kept grows with tokens, not with their square."""
    torch.manual_seed(0)
    backbone, length = Backbone(LONG_ROWS[family](), Activations("keep")), 800
    check_backbone(backbone)
    ids = torch.randint(5, 90, (length,)).tolist()
    row = pack([Example(context_ids=ids, movable=[True] * length, candidate_ids=[[5], [6]], gold=0, index=0)])
    prompt, saved = torch.randn(20, 64).requires_grad_(), SavedBytes(backbone.parameters())
    with saved.counting():
        backbone.score(row, backbone.inputs(row, prompt), prompt)
    assert saved.total / (20 + row.num_tokens) < 1.1 * backbone.activations.bytes_per_token
