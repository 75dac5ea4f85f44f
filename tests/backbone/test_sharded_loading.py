"""ZeRO-3 on one rank: every parameter and every buffer is what the unsharded model has, in dtype and to the bit."""

import deepspeed
import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, MixtralConfig, MixtralForCausalLM

from ptp_ds.backbone.loading import load_backbone
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import HeadPlan
from ptp_ds.ranks.distributed import start_processes
from tests.support.encoders import ENCODERS, make_encoder
from tests.support.reference import FAMILIES, make_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    return start_processes()


def loaded(folder, stage, precision, ranks, head):
    run = RunConfig(precision=precision, ds_config=f"ds_configs/zero{stage}.json")
    resolved = resolve_ds_config(read_ds_config(run.ds_config), run, set(), 1, 32)
    return load_backbone(folder, resolved, ranks, HeadPlan(head, outputs=3 if head == "classes" else 0)).model


def tensors(model):
    """Parameters, whole, buffers, and tensors that modules hold beside them, by name."""
    found = {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            found[f"parameter {name}"] = parameter.detach().clone()
    for path, module in model.named_modules():
        found |= {f"held {path}.{n}": v for n, v in vars(module).items() if isinstance(v, torch.Tensor)}
    return found


def assert_same(folder, precision, ranks, head, trained=()):
    whole, sharded = (tensors(loaded(folder, stage, precision, ranks, head)) for stage in (2, 3))
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        assert sharded[name].dtype == tensor.dtype, name
        if not any(part in name for part in trained):  # a classifier that the files lack starts from the trained values
            assert torch.equal(sharded[name], tensor), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_causal_families(family, precision, tmp_path, ranks):
    make_model(family).save_pretrained(tmp_path)
    assert_same(tmp_path, precision, ranks, "causal")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["masked", "classes"])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(family, head, precision, tmp_path, ranks):
    make_encoder(family, head, 3).save_pretrained(tmp_path)
    assert_same(tmp_path, precision, ranks, head, trained=("classifier", "score"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_that_are_stored_one_by_one(precision, tmp_path, ranks):
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2)).save_pretrained(tmp_path)
    assert_same(tmp_path, precision, ranks, "causal")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buffers_that_the_files_hold(precision, tmp_path, ranks):
    """A router's bias decides which experts a token takes; transformers keeps it in fp32."""
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        **SMALL, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=0,
        head_dim=8, n_group=1, topk_group=1,
    )  # fmt: skip
    model = Glm4MoeForCausalLM(config)
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for bias in biases:
        bias.normal_()
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, precision, ranks, "causal")
    sharded = loaded(tmp_path, 3, precision, ranks, "causal")
    found = [buffer for name, buffer in sharded.named_buffers() if name.endswith("e_score_correction_bias")]
    assert all(map(torch.equal, found, biases))
