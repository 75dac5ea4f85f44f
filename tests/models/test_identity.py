"""What makes two folders one model: not where they lie or how they are cut, but family, sizes and weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptp_ds.models.identity import difference, model_identity
from ptp_ds.models.source import load_config


@pytest.fixture
def other(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "other"))


def identity(folder: Path) -> dict:
    return model_identity(folder, load_config(folder))


def test_a_moved_folder_is_the_same_model(tiny_model, other):
    assert identity(other) == identity(tiny_model)
    found = identity(other)
    assert (found["family"], found["width"], found["layers"]) == ("llama", 32, 2)
    assert json.loads(json.dumps(found)) == found


def test_weights_in_other_files_are_the_same_weights(tiny_model, other):
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, other / file)
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert identity(other) == identity(tiny_model)


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_were_trained_further_are_others(tiny_model, other, name, row):
    tensors = load_file(other / "model.safetensors")
    tensors[name][-row] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert difference(identity(tiny_model), identity(other)) == "its weights are others"


def test_weights_of_another_dtype_are_others(tiny_model, other):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert difference(identity(tiny_model), identity(other)) == "its weights are others"


def test_a_config_that_was_written_anew_is_no_other_model(tiny_model, other):
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    ours, theirs = identity(other), identity(tiny_model)
    assert ours["config_sha256"] != theirs["config_sha256"]
    assert difference(theirs, ours) == ""


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"family": "gpt2"}, "its family is 'llama', not 'gpt2'"),
        ({"width": 64, "layers": 9}, "its width is 32, not 64"),
        ({"vocabulary": [1]}, r"its vocabulary's size is 600, not [1]"),
        ({"weights_sha256": "0"}, "its weights are others"),
        ({}, ""),
    ],
)
def test_what_differs_is_said(tiny_model, said, why):
    assert difference(said, {**identity(tiny_model), "vocabulary": 600}) == why


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (5, 4, 3), (0, 4)])
def test_tensors_of_every_shape(tmp_path, shape):
    from ptp_ds.models.identity import weights_sample

    found = set()
    for value in (1.0, 2.0):
        save_file({"w": torch.full(shape, value)}, tmp_path / "model.safetensors")
        found.add(weights_sample(tmp_path))
    assert len(found) == (1 if 0 in shape else 2)
