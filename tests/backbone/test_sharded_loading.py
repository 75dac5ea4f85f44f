"""ZeRO-3 on one rank: every parameter and every buffer is what the unsharded model has, in dtype and to the bit."""

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)

from ptp_ds.backbone.loading import load_backbone
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.models.heads import HeadPlan
from tests.support.encoders import ENCODERS, make_encoder
from tests.support.reference import FAMILIES, make_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}  # fmt: skip


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


def kept_in_fp32(folder, ranks):
    """Names of the parameters that a bf16 model holds in fp32."""
    model = loaded(folder, 3, "bf16", ranks, "causal")
    return {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_that_the_family_names_for_fp32(precision, tmp_path, ranks):
    """A router's matrix: rounded to bf16 it sends tokens to other experts."""
    torch.manual_seed(0)
    config = Ernie4_5_MoeConfig(
        **SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1, head_dim=8,
        moe_num_shared_experts=1,
    )  # fmt: skip
    Ernie4_5_MoeForCausalLM(config).save_pretrained(tmp_path)
    assert_same(tmp_path, precision, ranks, "causal")
    assert "model.layers.1.mlp.gate.weight" in kept_in_fp32(tmp_path, ranks)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parameters_that_the_family_makes_in_fp32(precision, tmp_path, ranks):
    torch.manual_seed(0)
    config = HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2, head_dim=8)
    HunYuanMoEV1ForCausalLM(config).save_pretrained(tmp_path)
    assert_same(tmp_path, precision, ranks, "causal")
    assert "model.layers.0.mlp.gate.wg.weight" in kept_in_fp32(tmp_path, ranks)


def test_shards_on_nvme_hold_one_dtype(tmp_path, ranks, monkeypatch):
    """DeepSpeed's files are of one dtype: such a family is refused there, by name."""
    from ptp_ds.backbone import sharded_loading

    torch.manual_seed(0)
    HunYuanMoEV1ForCausalLM(HunYuanMoEV1Config(**SMALL, num_experts=4, moe_topk=2, head_dim=8)).save_pretrained(
        tmp_path
    )
    real = sharded_loading._restore_computed

    def swapped(model, plain):  # as DeepSpeed leaves what it has written to a file
        real(model, plain)
        for parameter in model.parameters():
            parameter.ds_tensor.data = torch.empty(0, dtype=parameter.dtype)

    monkeypatch.setattr(sharded_loading, "_restore_computed", swapped)
    with pytest.raises(UserError, match=r"'hunyuan_v1_moe' keeps .* in float32, which shards on NVMe"):
        loaded(tmp_path, 3, "bf16", ranks, "causal")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_configuration_of_parts(precision, tmp_path, ranks):
    """gemma3's has a language model's inside, whose padding token is its own."""
    torch.manual_seed(0)
    text = {**SMALL, "pad_token_id": 1, "head_dim": 8, "sliding_window": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    model.save_pretrained(tmp_path)
    assert_same(tmp_path, precision, ranks, "causal")
    sharded = loaded(tmp_path, 3, precision, ranks, "causal")
    assert sharded.config.get_text_config().pad_token_id == 1


def test_a_padding_token_that_must_be_a_number(tmp_path, ranks):
    torch.manual_seed(0)
    config = ModernBertDecoderConfig(**{**SMALL, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
                                        "cls_token_id": 2, "sep_token_id": 2})  # fmt: skip
    ModernBertDecoderForCausalLM(config).save_pretrained(tmp_path)
    assert_same(tmp_path, "fp32", ranks, "causal")


def store_both(folder, tied, change):
    """The files hold tied tensors by both names, as older ones do; what is added to the second: `change`."""
    file = folder / "model.safetensors"
    held = load_file(file)
    for name, other in tied.items():
        held[name] = held[other] + change
    save_file(held, file, metadata={"format": "pt"})
    return held


TIED = {
    "causal": {"lm_head.weight": "model.embed_tokens.weight"},
    "masked": {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
               "cls.predictions.decoder.bias": "cls.predictions.bias"},
}  # fmt: skip


def save_tied(head, folder):
    torch.manual_seed(0)
    if head == "causal":
        LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(folder)
    else:
        BertForMaskedLM(BertConfig(**{**SMALL, "pad_token_id": 0})).save_pretrained(folder)


@pytest.mark.parametrize("change", [0.0, 0.5])
@pytest.mark.parametrize("head", TIED)
def test_tied_names_of_which_the_files_hold_both(head, change, tmp_path, ranks, caplog):
    """Other values are another model than a tied one: both stages take it as it is stored, and say so."""
    save_tied(head, tmp_path)
    held = store_both(tmp_path, TIED[head], change)
    assert_same(tmp_path, "fp32", ranks, head)
    caplog.clear()
    sharded = loaded(tmp_path, 3, "fp32", ranks, head)
    for name, other in TIED[head].items():
        parameters = sharded.get_parameter(name), sharded.get_parameter(other)
        assert (parameters[0] is parameters[1]) == (change == 0)
        with deepspeed.zero.GatheredParameters(list(parameters)):
            assert torch.equal(parameters[0], held[name])
            assert torch.equal(parameters[1], held[other])
    said = [record.getMessage() for record in caplog.records if "though config.json ties them" in record.getMessage()]
    assert len(said) == (len(TIED[head]) if change else 0)
    for line, (name, other) in zip(said, TIED[head].items(), strict=bool(change)):
        assert name in line
        assert other in line


def test_one_dtype_by_each_name_is_compared_by_value(tmp_path, ranks):
    save_tied("causal", tmp_path)
    file = tmp_path / "model.safetensors"
    held = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file({**held, "lm_head.weight": held["model.embed_tokens.weight"].float()}, file, metadata={"format": "pt"})
    sharded = loaded(tmp_path, 3, "fp32", ranks, "causal")
    assert sharded.lm_head.weight is sharded.model.embed_tokens.weight


def test_the_name_that_the_files_lack_is_tied_to_what_they_hold(tmp_path, ranks):
    """Where the head alone is stored, the embedding is the head's."""
    save_tied("causal", tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    save_file(held, file, metadata={"format": "pt"})
    assert_same(tmp_path, "fp32", ranks, "causal")
