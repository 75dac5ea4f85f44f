"""What a run must share with the checkpoint that it goes on from, beside its settings: rows, and where it started."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.train import prepare
from ptp_ds.config.flags import parse_run
from ptp_ds.models.source import load_config
from ptp_ds.training.checkpoint import Checkpoint, save_checkpoint

LATER = ("selection data", "prompt_init", "init_text", "prompt in --init_adapter", "precision")  # untold by older
ROW = {"premise": "It rains, he said.", "hypothesis": "it rains", "label": "neutral"}


@pytest.fixture
def base(tiny_model) -> list[str]:
    """Flags of a run of two steps on the demo data."""
    return ["--model", str(tiny_model), "--task", "CB", "--prompt_length", "4", "--max_steps", "2"]


@pytest.fixture
def saved_by(tmp_path, monkeypatch) -> Callable[[list[str]], Path]:
    """saved_by(flags): a checkpoint of step 1 of that run, in out."""
    monkeypatch.chdir(tmp_path)

    def save(flags: list[str]) -> Path:
        tensors = {name: torch.zeros(4, 32) for name in ("prompt", "exp_avg", "exp_avg_sq")}
        checkpoint = Checkpoint(1, {**tensors, "adam_step": torch.zeros(1)}, None, prepare(*parse_run(flags)).identity)
        return save_checkpoint(Path("out/checkpoints"), checkpoint, keep=1)

    return save


def test_other_selection_rows(base, saved_by, write_rows):
    """Scores of different rows would be compared."""
    rows = [{**ROW, "premise": f"It rains, he said {number} times."} for number in range(3)]
    for split in ("train", "val", "dev"):
        write_rows(Path("data/CB") / f"{split}.jsonl", rows)
    run = [*base, "--data_dir", "data", "--select_split", "dev", "--output_dir", "out"]
    saved_by(run)
    prepare(*parse_run([*run, "--resume", "auto"]))
    write_rows(Path("data/CB/dev.jsonl"), rows[:2])
    with pytest.raises(ValueError, match="is a checkpoint of another run: its selection data is '"):
        prepare(*parse_run([*run, "--resume", "auto"]))


def test_another_adapter_to_start_from(base, saved_by, tiny_model):
    """Its numbers count, not its place: what the untrained prompt scores is reported behind the resumed run, too."""
    for name, value in (("one", 0.0), ("moved", 0.0), ("other", 1.0)):
        write_adapter(Path(name), torch.full((4, 32), value), "model", load_config(tiny_model), {})
    run = [*base, "--output_dir", "out", "--prompt_init", "adapter", "--init_adapter"]
    saved_by([*run, "one"])
    prepare(*parse_run([*run, "moved", "--resume", "auto"]))
    with pytest.raises(ValueError, match="is a checkpoint of another run: its prompt in --init_adapter is '"):
        prepare(*parse_run([*run, "other", "--resume", "auto"]))


def test_answers_in_another_order(base, saved_by, write_rows):
    """A classifier's outputs would be answered with each other's classes."""
    words = {"neutral": " perhaps", "entailment": " yes", "contradiction": " no"}
    template = {"name": "CB", "text": "{premise} {hypothesis}:", "label": "label", "metrics": ["accuracy"]}
    for name, answers in (("first", words), ("same", words), ("other", dict(sorted(words.items())))):
        Path(f"{name}.json").write_text(json.dumps({**template, "verbalizers": answers}))
    run = [*base, "--output_dir", "out", "--task"]
    saved_by([*run, "first.json"])
    prepare(*parse_run([*run, "same.json", "--resume", "auto"]))
    said = (
        r"another run: its order of answers is \['neutral', 'entailment', 'contradiction'\], this run's is "
        r"\['contradiction', 'entailment', 'neutral'\]\. Resume with the same settings"
    )
    with pytest.raises(ValueError, match=said):
        prepare(*parse_run([*run, "other.json", "--resume", "auto"]))


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that may be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_model_that_was_moved_is_the_same_one(base, saved_by, model, capsys):
    run = [*base, "--output_dir", "out", "--model"]
    saved_by([*run, "model"])
    model.rename(model.with_name("moved"))
    prepare(*parse_run([*run, "moved", "--resume", "auto"]))
    assert capsys.readouterr().err == ""


def test_other_weights_under_the_models_name(base, saved_by, model, lively_model, capsys):
    run = [*base, "--output_dir", "out", "--model", "model"]
    saved_by(run)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "rope_theta": 5000.0}))
    prepare(*parse_run([*run, "--resume", "auto"]))
    said = "warning: the config.json of model is not the one that the run began with, though its weights are: the steps"
    assert said in capsys.readouterr().err
    shutil.copy(lively_model / "model.safetensors", model)
    said = "is a checkpoint of another run: the weights of its model, 'model', are not those of 'model'. Resume with"
    with pytest.raises(ValueError, match=re.escape(said)):
        prepare(*parse_run([*run, "--resume", "auto"]))


def test_an_older_checkpoint_tells_the_model_by_its_name(base, saved_by, model):
    run = [*base, "--output_dir", "out", "--model"]
    saved = saved_by([*run, "model"])
    meta = json.loads((saved / "state.json").read_text())
    for name in ("model's weights", "model's config.json"):
        del meta["identity"][name]
    (saved / "state.json").write_text(json.dumps(meta))
    prepare(*parse_run([*run, "model", "--resume", "auto"]))
    model.rename(model.with_name("moved"))
    with pytest.raises(ValueError, match="another run: its model is 'model', this run's is 'moved'"):
        prepare(*parse_run([*run, "moved", "--resume", "auto"]))


def test_what_an_older_checkpoint_does_not_tell_may_be_anything(base, saved_by, capsys):
    saved = saved_by(base)
    meta = json.loads((saved / "state.json").read_text())
    for name in (*LATER, "model's weights", "model's config.json"):
        del meta["identity"][name]
    (saved / "state.json").write_text(json.dumps(meta))
    others = ["--select_split", "train", "--prompt_init", "text", "--init_text", "words", "--precision", "bf16"]
    prepare(*parse_run([*base, *others, "--output_dir", "out", "--resume", "auto"]))
    assert capsys.readouterr().err == ""
