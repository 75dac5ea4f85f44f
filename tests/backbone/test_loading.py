"""Loading a backbone: whole and sharded give the same weights; damaged or foreign files are one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.loading import load_backbone
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.models.heads import HeadPlan, auto_class
from ptp_ds.models.positions import max_row_length
from ptp_ds.models.source import load_config, load_tokenizer, resolve_model
from tests.support.encoders import make_encoder
from tests.support.reference import make_model


def resolved(stage):
    raw = read_ds_config(f"ds_configs/zero{stage}.json")
    return resolve_ds_config(raw, RunConfig(), set(), 1, 32)


def gathered(backbone):
    import deepspeed

    values = {}
    for name, parameter in backbone.model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            values[name] = parameter.detach().clone()
    return values


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_sharded_loading_gives_the_saved_weights(family, tmp_path, ranks):
    """gpt2's files lack the module's prefix, opt and gemma2 tie their head."""
    make_model(family).save_pretrained(tmp_path)
    expected = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    values = gathered(load_backbone(tmp_path, resolved(3), ranks))
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)


def test_whole_loading(tiny_model, ranks):
    backbone = load_backbone(tiny_model, resolved(2), ranks)
    expected = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in backbone.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.train().training


def copy_of(tiny_model, tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_missing_tensor(tiny_model, tmp_path, ranks):
    folder = copy_of(tiny_model, tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"has no .model\.norm\.weight. and 0 more"):
        load_backbone(folder, resolved(3), ranks)


def test_wrong_shape(tiny_model, tmp_path, ranks):
    folder = copy_of(tiny_model, tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(7,\), its config.json says \(32,\)"):
        load_backbone(folder, resolved(3), ranks)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_classifiers_frozen_tensors_have_the_shapes_that_config_json_says(tmp_path, ranks, stage):
    """The classifier alone may be another task's: it is trained. Frozen weights made anew would be random."""
    make_encoder("bert", "classes", labels=5).save_pretrained(tmp_path)
    plan = HeadPlan("classes", outputs=3)
    loaded = load_backbone(tmp_path, resolved(stage), ranks, plan)
    assert loaded.head.trained == {"classifier.weight": (3, 32), "classifier.bias": (3,)}
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 128}))
    with pytest.raises(UserError, match=r"embeddings.weight has shape \(96, 32\), its config.json says \(128, 32\)"):
        load_backbone(tmp_path, resolved(stage), ranks, plan)


def test_no_or_damaged_safetensors(tiny_model, tmp_path, ranks):
    folder = copy_of(tiny_model, tmp_path, lambda tensors: None)
    (folder / "model.safetensors").write_bytes(b"\x10" * 64)
    with pytest.raises(ValueError, match="damaged"):
        load_backbone(folder, resolved(3), ranks)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        load_backbone(folder, resolved(3), ranks)


def test_a_package_that_the_model_needs(tiny_model, ranks, monkeypatch):
    def needs(*args, **kwargs):
        raise ImportError("Llama requires the timm library")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", needs)
    with pytest.raises(UserError, match=r"model that config\.json describes \(Llama requires the timm library\)"):
        load_backbone(tiny_model, resolved(2), ranks)


def test_folders_that_are_no_causal_model(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nosuch"}))
    with pytest.raises(ValueError, match="no model that transformers knows"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="'vit' has no causal language model"):
        auto_class(load_config(tmp_path), "causal", tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_row_length_is_the_contexts_and_long_ropes_shorter_one():
    from transformers import LlamaConfig

    assert max_row_length(LlamaConfig(max_position_embeddings=512)) == 512
    stretched = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
                 "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}  # fmt: skip
    config = LlamaConfig(max_position_embeddings=512, hidden_size=32, num_attention_heads=4, rope_parameters=stretched)
    assert max_row_length(config) == 64
