"""Models that the hub gives, and why one can't be had."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from ptp_ds.errors import UserError
from ptp_ds.hosts.model_files import present_model
from ptp_ds.models.source import resolve_model
from tests.support.hub import OWNER, Repository

NAME = f"{OWNER}/model"


def refusal(name: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(name)
    said = str(caught.value)
    assert " Give --model a folder with config.json, a hub id (owner/name) that this machine can reach, or " in said
    return said


def unheld(name: str) -> str:
    return f"Model {name!r} is no folder here and can't be had from the hub: "


def test_a_model_of_the_hub(hub):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({"config.json": b"{}", "x.py": b""})
    assert [file.name for file in resolve_model(NAME).iterdir()] == ["config.json"]


def test_a_gated_model_says_how_to_get_it(hub):
    hub.repositories[NAME] = Repository(gated=True)
    hub.repositories[NAME].commit({"config.json": b"{}"})
    said = refusal(NAME)
    assert said.startswith(unheld(NAME) + "the hub gives it to those alone who accepted its terms: ")
    assert "accept them on its page there, and run `hf auth login`, or set HF_TOKEN." in said


def test_a_model_that_is_not_there(hub):
    assert refusal(NAME).startswith(unheld(NAME) + "the hub shows no such repository, or not to this token.")


def test_a_hub_that_can_not_be_reached(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    wanted = "the hub can't be reached, and nothing was downloaded before."
    assert refusal(NAME).startswith(unheld(NAME) + wanted)


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(NAME).startswith(unheld(NAME) + "HF_HUB_OFFLINE is set, and nothing was downloaded before.")


WEIGHTS = ["model-1.safetensors", "model-2.safetensors"]
MODEL = {
    "config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}",
    "model.safetensors.index.json": json.dumps({"weight_map": {name: name for name in WEIGHTS}}).encode(),
    **dict.fromkeys(WEIGHTS, b"weights"),
}  # fmt: skip
BESIDE = dict.fromkeys(["original/params.json", "original/model.safetensors", "consolidated.safetensors"], b"{}")


def test_a_models_other_formats_are_not_downloaded(hub):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(MODEL | BESIDE)
    folder = resolve_model(NAME)
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == MODEL.keys()


def test_offline_with_what_transformers_has_downloaded(hub, monkeypatch):
    """That is neither a licence nor, where there is a tokenizer.json, another vocabulary."""
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(MODEL | BESIDE | {"LICENSE.txt": b"", "vocab.json": b"{}"})
    held = Path(snapshot_download(NAME, allow_patterns=list(MODEL)))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model(NAME) == present_model(NAME) == held
    for name in MODEL:
        lost = (held / name).rename(held / "lost")
        assert refusal(NAME).startswith(unheld(NAME) + "HF_HUB_OFFLINE is set, and not all of it was downloaded before")
        lost.rename(held / name)


def test_offline_with_a_part_of_the_model(hub, monkeypatch):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit({"config.json": b"{}", "tokenizer.json": b"{}"})
    (resolve_model(NAME) / "tokenizer.json").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(NAME).startswith(unheld(NAME) + "HF_HUB_OFFLINE is set, and not all of it was downloaded before.")
