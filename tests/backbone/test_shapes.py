"""Shapes of small models, counted by hand: what a token passes through, with experts and without."""

import pytest
from transformers import AutoConfig

from ptp_ds.backbone.shapes import ModelShape, shape_of
from ptp_ds.planning.way import layer_bytes

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 100, "pad_token_id": None}  # fmt: skip
ATTENTION = 64 * 64 + 2 * 64 * 32 + 64 * 64  # q, k and v, the output


def small(family: str, **changes) -> ModelShape:
    return shape_of(AutoConfig.for_model(family, **SMALL, **changes))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_dense_layer_with_a_gate_of_its_own_or_fused(family):
    shape = small(family, intermediate_size=160)
    assert (shape.gated, shape.inner, shape.routed, shape.routed_inner) == (True, 160, 0, 0)
    assert shape.matrix_elements == 2 * (ATTENTION + 3 * 64 * 160)


def test_a_feed_forward_without_a_gate():
    shape = small("starcoder2", intermediate_size=160)
    assert (shape.gated, shape.matrix_elements) == (False, 2 * (ATTENTION + 2 * 64 * 160))


def test_a_token_passes_the_experts_that_it_is_routed_to():
    """mixtral: 2 of 8, each as wide as a dense layer; the router scores all 8."""
    shape = small("mixtral", intermediate_size=160, num_local_experts=8, num_experts_per_tok=2)
    assert (shape.gated, shape.inner, shape.routed, shape.routed_inner) == (True, 0, 2, 320)
    assert shape.matrix_elements == 2 * (ATTENTION + 8 * 64 + 2 * 3 * 64 * 160)
    assert shape.layer_elements > 2 * 8 * 3 * 64 * 160, "all of them are stored and gathered"


def test_shared_experts_are_every_tokens():
    """qwen2_moe: 4 of 16 narrow ones beside a shared one with a gate of one output; the first layer is dense."""
    shape = small(
        "qwen2_moe", intermediate_size=160, moe_intermediate_size=48, shared_expert_intermediate_size=96,
        num_experts=16, num_experts_per_tok=4, mlp_only_layers=[0],
    )  # fmt: skip
    experts = 16 * 64 + 4 * 3 * 64 * 48 + 3 * 64 * 96 + 64
    assert shape.matrix_elements == 2 * ATTENTION + 3 * 64 * 160 + experts
    assert (shape.inner, shape.routed, shape.routed_inner) == ((160 + 96) / 2, 4 / 2, 4 * 48 / 2)


@pytest.mark.parametrize(
    ("family", "changes", "passed"),
    [
        ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}, 2),
        ("ernie4_5_moe", {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 0, "moe_layer_start_index": 0,
                          "moe_intermediate_size": 160, "moe_layer_end_index": 1}, 2),
        ("aria_text", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 0}, 2),
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": [2, 2], "head_dim": 16}, 2),
        # each of its experts works on every token
        ("llama4_text", {"num_local_experts": 8, "num_experts_per_tok": 1, "head_dim": 16}, 8),
    ],
)  # fmt: skip
def test_families_name_their_experts_otherwise(family, changes, passed):
    shape = small(family, intermediate_size=160, **changes)
    assert (shape.gated, shape.routed, shape.routed_inner) == (True, passed, passed * 160)


def test_experts_that_are_stored_as_one_matrix():
    """dbrx: w1, v1 and w2 of all experts, one below the other."""
    attention, experts = {"kv_n_heads": 2, "rope_theta": 1e4}, {"moe_num_experts": 8, "moe_top_k": 2}
    config = AutoConfig.for_model(
        "dbrx", d_model=64, n_layers=2, n_heads=4, vocab_size=100, attn_config=attention,
        ffn_config={"hidden_size": 64, "ffn_hidden_size": 160, **experts},
    )  # fmt: skip
    shape = shape_of(config)
    assert (shape.gated, shape.routed, shape.routed_inner) == (True, 2, 320)
    assert shape.matrix_elements == 2 * (ATTENTION + 8 * 64 + 2 * 3 * 64 * 160)


def test_kept_activations_follow_the_experts_of_a_token():
    """Each keeps gate, up, their product's factor, and its output: measured with transformers' grouped products."""
    one, two = (small("mixtral", intermediate_size=160, num_experts_per_tok=count) for count in (1, 2))
    assert layer_bytes(two, 4, cuda=True) - layer_bytes(one, 4, cuda=True) == 4 * (3 * 160 + 64)
