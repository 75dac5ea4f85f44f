"""README.md of an adapter that is pushed: kept as its owner left it, but where it names a path of this machine."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ptp_ds.adapters.share import shared_files


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("See https://huggingface.co/datasets/x, huggingface.co/data.", True), ("By data/x, ../data or ~/data.", True),
        ("In /data-2, /data.csv, /database and /mnt/data.", True), ("Of /data.", False), ("In `/data/rte`", False),
        ("file:///data/x", False), ("-v own:/data", False), ("<b>/data</b>", False), ("Of /d\u00e4ten", False),
    ],
)  # fmt: skip
def test_a_readme_is_kept_that_names_no_whole_path(made, capsys, text, kept):
    card = json.loads((made / "ptp_ds.json").read_text())
    card["data"], card["model"]["folder"] = {"data_dir": "/data", "dataset": None}, "/d\u00e4ten"
    (made / "ptp_ds.json").write_text(json.dumps(card))
    (made / "README.md").write_text(text)
    assert (shared_files(made)["README.md"] == text) == kept
    told = capsys.readouterr().err
    assert ("README.md names '/d" in told) == (not kept)
    assert ("so one made anew is pushed, with its license and language but without its text" in told) == (not kept)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("relative", ["../tiny", "tiny", "models/tiny"])
def test_a_readme_of_peft_s_names_no_relative_path(relative, tiny_model, tmp_path, monkeypatch):
    """What peft writes of a model in a folder by its relative path: base_model, and a tag with it."""
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path(relative).parent.mkdir(exist_ok=True)
    Path(relative).symlink_to(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(relative)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    get_peft_model(base, config).save_pretrained("theirs")
    assert f"base_model: {relative}\n" in Path("theirs/README.md").read_text()
    files = shared_files(Path("theirs"))
    assert ModelCard(files["README.md"]).data.base_model is None
    assert f"adapter:{relative}" not in files["README.md"]
    assert all(relative not in text for text in files.values()) or relative == "tiny"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("The rows of data/cb are mine.", False), ("Its model lies in ../models/x.", False),
        ("By ../../attacks/own.py.", False), ("Take --ds_config ds_configs/zero3.json.", True), ("data and x", True),
        ("---\nbase_model: owner/model\n---\nThat one.", True), ("---\nbase_model: x\n---\n", True),
        ("---\nbase_model: ./x\n---\n", False),
    ],
)  # fmt: skip
def test_whatever_the_card_loses_is_a_path_in_a_readme(made, text, kept):
    card = json.loads((made / "ptp_ds.json").read_text())
    card["result"]["settings"] |= {
        "data_dir": "data/cb",
        "model": "../models/x",
        "perturbation": "../../attacks/own.py",
    }
    (made / "ptp_ds.json").write_text(json.dumps(card))
    (made / "README.md").write_text(text)
    assert (shared_files(made)["README.md"] == text) == kept


def test_words_of_the_owner_s_that_are_dropped_are_told(made, capsys):
    """Only those: what the adapter was written with is ours."""
    shared_files(made)
    shared_files(made, "owner/model")
    assert capsys.readouterr().err == ""
    with open(made / "README.md", "a") as file:
        file.write("Ask me.\n")
    assert "Ask me." in shared_files(made)["README.md"]
    assert capsys.readouterr().err == ""
    assert "Ask me." not in shared_files(made, "owner/model")["README.md"]
    assert "README.md doesn't know what --base_model says, so one made anew is pushed" in capsys.readouterr().err
