"""Quantised checkpoints are refused by their configuration, and by their tensors where that says nothing."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config

from ptp_ds.backbone.loading import load_backbone
from ptp_ds.backbone.shapes import config_of
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.models.quantised import require_plain_config
from ptp_ds.models.source import load_config

NAME = "model.layers.1.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}


def folder_of(tiny_model: Path, folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """A copy of the tiny model with some other tensors, and more in its configuration."""
    shutil.copytree(tiny_model, folder)
    stored = {**load_file(folder / "model.safetensors"), **tensors}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, **config}))
    return folder


def fp8(tiny_model: Path) -> dict[str, torch.Tensor]:
    """One weight as fp8 repositories store it: the numbers, and by what they are multiplied, a block of 16 by 16."""
    weight = load_file(tiny_model / "model.safetensors")[NAME]
    scale = weight.reshape(4, 16, 2, 16).abs().amax((1, 3)) / 448
    numbers = (weight / scale.repeat_interleave(16, 0).repeat_interleave(16, 1)).to(torch.float8_e4m3fn)
    return {NAME: numbers, f"{NAME}_scale_inv": scale}


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    said = str(caught.value)
    assert "quantised weights are not read. Give the model's own weights in half precision, or dequantise them" in said
    return said


@pytest.mark.parametrize("method", [FP8, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_a_configuration_that_says_so(method, tiny_model, tmp_path):
    folder = folder_of(tiny_model, tmp_path / "model", {}, quantization_config=method)
    assert refusal(load_config, folder).startswith(f"{folder}/config.json holds quantization_config: ")
    assert refusal(config_of, str(folder)).startswith(f"--model {folder}: config.json holds quantization_config: ")


@pytest.mark.parametrize("nothing", [None, {}])
def test_a_key_that_holds_nothing(nothing, tiny_model, tmp_path):
    folder = folder_of(tiny_model, tmp_path / "model", {}, quantization_config=nothing)
    assert load_config(folder).model_type == "llama"


def test_a_language_model_inside():
    config = Gemma3Config(text_config={"num_hidden_layers": 2})
    require_plain_config(config, "x")
    config.text_config.quantization_config = FP8
    assert refusal(require_plain_config, config, "x").startswith("x holds quantization_config: ")
    inside = SimpleNamespace(sub_configs={"text_config": dict}, text_config=SimpleNamespace(quantization_config=FP8))
    assert refusal(require_plain_config, inside, "x").startswith("x holds quantization_config: ")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("stored", ["fp8", "int8", "scaled"])
def test_tensors_whose_configuration_says_nothing(stored, stage, tiny_model, tmp_path, ranks):
    """Also where the key was deleted: the numbers are no weights without their scales."""
    tensors = fp8(tiny_model)
    if stored == "int8":
        tensors = {NAME: torch.ones(64, 32, dtype=torch.int8)}
    if stored == "scaled":
        tensors[NAME] = tensors[NAME].to(torch.bfloat16)
    folder = folder_of(tiny_model, tmp_path / "model", tensors)
    resolved = resolve_ds_config(read_ds_config(f"ds_configs/zero{stage}.json"), RunConfig(), set(), 1, 32)
    how = {"fp8": "as F8_E4M3: ", "int8": "as I8: ", "scaled": f"beside {NAME}_scale_inv: "}[stored]
    said = refusal(load_backbone, folder, resolved, ranks)
    assert said.startswith(f"{folder}/model.safetensors: {NAME} is stored {how}")


def test_whole_numbers_that_are_no_weights(tiny_model, tmp_path, ranks):
    """Older families store masks and positions, and some files a scale of the key cache."""
    more = {"attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "position_ids": torch.arange(4)[None],
            "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}  # fmt: skip
    folder = folder_of(tiny_model, tmp_path / "model", more)
    resolved = resolve_ds_config(read_ds_config("ds_configs/zero3.json"), RunConfig(), set(), 1, 32)
    assert load_backbone(folder, resolved, ranks).vocabulary == load_config(tiny_model).vocab_size
