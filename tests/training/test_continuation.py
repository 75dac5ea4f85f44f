"""Which folders a run may write to: none that another run, of one prompt or of several, has left something in."""

from pathlib import Path

import pytest

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import lock
from ptp_ds.training.continuation import checked_output_dir, holds_run

OF_ONE = ["result.json", "adapter/x", "checkpoints/step-000001/state.json", "checkpoints/step-000001.damaged/x"]
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
