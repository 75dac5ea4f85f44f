"""Which folders a run may write to: none that another run, of one prompt or of several, has left something in; and what
one that goes on leaves of an end before, or of another run.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import ptp_ds
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import lock
from ptp_ds.training.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from ptp_ds.training.continuation import Continuation, checked_output_dir, holds_run, set_results_aside

OF_ONE = ["result.json", "adapter/x", "checkpoints/step-000001/state.json", "checkpoints/step-000001.damaged/x"]
STATE = {name: torch.zeros(4, 8) for name in ("prompt", "exp_avg", "exp_avg_sq")} | {"adam_step": torch.zeros(1)}
OF_SEVERAL = ["population.json", *(f"members/seed-0/{name}" for name in OF_ONE)]
GO_ON = "holds another run; continue it with --resume auto or give a new folder."


def made(folder: Path, name: str) -> str:
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("kept")
    return str(folder)


def refusal(folder: str, several: bool, resume: str | None) -> str:
    """The sentence behind the folder's name; '' where the run may write there."""
    try:
        checked_output_dir(RunConfig(output_dir=folder, resume=resume), several)
    except UserError as error:
        return str(error).removeprefix(f"--output_dir {folder} ")
    return ""


@pytest.mark.parametrize("held", OF_ONE)
def test_a_folder_of_one_prompt(tmp_path, held):
    folder = made(tmp_path / "out", held)
    assert holds_run(Path(folder))
    assert refusal(folder, False, None) == GO_ON
    assert refusal(folder, False, "auto") == ""
    for resume in (None, "auto"):
        assert refusal(folder, True, resume) == "holds a run of one prompt; give several prompts a new folder."


@pytest.mark.parametrize("held", OF_SEVERAL)
def test_a_folder_of_several_prompts(tmp_path, held):
    folder = made(tmp_path / "out", held)
    assert holds_run(Path(folder))
    assert refusal(folder, True, None) == GO_ON
    assert refusal(folder, True, "auto") == ""
    for resume in (None, "auto", "elsewhere/checkpoints/step-000001"):
        assert refusal(folder, False, resume) == (
            "holds a run of several prompts; continue it with its --seeds or --population and --resume auto, one of "
            f"them with --output_dir {folder}/members/NAME, or give a new folder."
        )


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("held", ["log.jsonl", "config.json", "members/seed-0/log.jsonl", "members/seed-0/config.json"])
def test_what_failed_before_its_first_checkpoint_leaves_its_folder_free(tmp_path, held, several):
    folder = made(tmp_path / "out", held)
    assert not holds_run(Path(folder))
    assert refusal(folder, several, None) == ""


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("resume", [None, "auto"])
@pytest.mark.parametrize("held", ["log.jsonl", "members/seed-0/log.jsonl"])
def test_a_folder_that_is_being_written(tmp_path, held, several, resume):
    folder = made(tmp_path / "out", held)
    with (tmp_path / "out" / held).open() as log:
        lock(log)
        assert refusal(folder, several, resume) == "is being written by a run that still goes on; give another folder."
    assert refusal(folder, several, resume) == ""


@pytest.fixture
def ended(tmp_path) -> Path:
    """The folder of a run that ended at step 4, with checkpoints of steps 2 and 4, and what it wrote at its end."""
    for step in (2, 4):
        save_checkpoint(tmp_path / "run" / "checkpoints", Checkpoint(step, STATE, None, {}), keep=None)
    for name in ("adapter/x", "predictions/x", "result.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text('{"steps": 4}')
    return tmp_path / "run"


def going_on(folder: Path | None, **changes) -> Continuation:
    return Continuation(None if folder is None else load_checkpoint(folder), folder, **changes)


def test_results_of_an_end_that_is_left_are_set_aside(ended):
    """They would be taken for those of the run that goes on, which writes its own at its end alone."""
    two, four = list_checkpoints(ended / "checkpoints")
    assert set_results_aside(ended, going_on(four)) == []
    assert set_results_aside(ended, going_on(two, skipped=("step-000004 is damaged",))) == [], "the same run"
    assert set_results_aside(ended, going_on(two)) == ["adapter.left", "result.json.left", "predictions.left"]
    assert set_results_aside(ended, going_on(two)) == []
    (ended / "result.json").write_text('{"steps": 2}')
    assert set_results_aside(ended, going_on(two)) == [], "it goes on from there"
    (ended / "result.json").write_text('{"steps": 3}')
    assert set_results_aside(ended, going_on(two)) == ["result.json.left1"]
    assert sorted(path.name for path in ended.iterdir()) == [
        "adapter.left", "checkpoints", "predictions.left", "result.json.left", "result.json.left1",
    ]  # fmt: skip


@pytest.mark.parametrize("steps", ['{"steps": 4}', "{}", "{", None])
def test_results_beside_a_checkpoint_from_elsewhere_are_set_aside(ended, tmp_path, steps):
    (ended / "result.json").unlink()
    if steps is not None:
        (ended / "result.json").write_text(steps)
    elsewhere = save_checkpoint(tmp_path / "other", Checkpoint(9, STATE, None, {}), keep=None)
    assert "adapter.left" in set_results_aside(ended, going_on(elsewhere))


def test_results_are_set_aside_where_a_run_starts_anew(ended):
    """Its checkpoints were taken away, so --resume auto finds none."""
    shutil.rmtree(ended / "checkpoints")
    assert "adapter.left" in set_results_aside(ended, going_on(None))


def test_predictions_alone_are_the_users(tmp_path):
    (tmp_path / "predictions").mkdir()
    assert set_results_aside(tmp_path, going_on(None)) == []


RECORDS = ["log.jsonl", "tensorboard/events", "dvclive/metrics.json"]


def recorded(folder: Path) -> Path:
    for name in RECORDS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("before")
    return folder


def left_of(folder: Path, continuation: Continuation) -> set[str]:
    """The records that are set aside, by their names."""
    names = {name.split("/")[0] for name in RECORDS}
    return {name.removesuffix(".left") for name in set_results_aside(folder, continuation)} & names


@pytest.mark.parametrize("held", ["results", "checkpoints", "records"])
def test_records_of_another_run_are_set_aside(ended, tmp_path, held):
    """Their lines up to the checkpoint's step would stand before the other run's, whatever else is in the folder."""
    folder = {"results": ended, "checkpoints": tmp_path / "bare", "records": tmp_path / "empty"}[held]
    recorded(folder)
    if held == "checkpoints":
        shutil.copytree(ended / "checkpoints", folder / "checkpoints")
    elsewhere = save_checkpoint(tmp_path / "other", Checkpoint(4, STATE, None, {}), keep=None)
    assert left_of(folder, going_on(elsewhere)) == {"log.jsonl", "tensorboard", "dvclive"}
    assert (folder / "log.jsonl.left").read_text() == "before"
    recorded(folder)
    assert "log.jsonl.left1" in set_results_aside(folder, going_on(elsewhere))


def test_records_up_to_a_checkpoint_of_the_folders_own_stay(ended):
    two, four = list_checkpoints(ended / "checkpoints")
    recorded(ended)
    for continuation in (going_on(four), going_on(two, skipped=("step-000004 is damaged",)), going_on(two)):
        assert left_of(ended, continuation) == set()


def test_records_where_a_run_starts_anew(ended, tmp_path):
    """Beside results they are an ended run's; what saved nothing leaves nothing to keep."""
    shutil.rmtree(recorded(ended) / "checkpoints")
    assert left_of(ended, going_on(None)) == {"log.jsonl", "tensorboard", "dvclive"}
    assert left_of(recorded(tmp_path / "bare"), going_on(None)) == set()


def test_a_log_is_of_one_run(tiny_model, tmp_path, monkeypatch):
    """The folder holds a run of seed 0 that was stopped, and seed 1's goes on there from its own checkpoint."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    given = {"task": "COPA", "model": str(tiny_model), "prompt_length": 4, "batch_size": 4, "eval_tokens": 600,
             "log_every": 1, "perturbation": "none", "verbose": False}  # fmt: skip
    for seed in (0, 1):
        ptp_ds.train(**given, seed=seed, max_steps=1, output_dir=tmp_path / str(seed))
    for name in ("adapter", "result.json"):
        (tmp_path / "0" / name).rename(tmp_path / name)
    checkpoint = tmp_path / "1" / "checkpoints" / "step-000001"
    ptp_ds.train(**given, seed=1, max_steps=2, output_dir=tmp_path / "0", resume=str(checkpoint))
    log, left = ((tmp_path / "0" / name).read_text().splitlines() for name in ("log.jsonl", "log.jsonl.left"))
    assert {json.loads(line)["step"] for line in log} == {2}
    assert {json.loads(line)["step"] for line in left} == {0, 1}
    assert (tmp_path / "0" / "tensorboard.left").is_dir()
