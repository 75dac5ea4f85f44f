"""What a population's members must share, where they go on, and one that ends or whose numbers are not finite."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score

import ptp_ds
from ptp_ds.commands.members import prepare_population
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.ranks.faults import OutputError
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import load_split
from ptp_ds.training.monitor import Monitor
from ptp_ds.training.trainer import Trainer
from tests.support.paths import ROOT
from tests.support.populations import distance, require_equal, state_of, steps_of, written

pytestmark = pytest.mark.usefixtures("no_launcher")


# what they must share


def test_a_prompt_within_the_text_beside_one_in_front(tiny_model, tmp_path):
    template = json.loads((ROOT / "ptp_ds/tasks/templates/Reviews.json").read_text())
    (tmp_path / "inside.json").write_text(json.dumps({**template, "text": "Review: {review}<prompt>"}))
    members = [{"name": "a"}, {"name": "b", "seed": 1}, {"name": "c", "task": str(tmp_path / "inside.json")}]
    run = RunConfig(task="Reviews", model=str(tiny_model), population=written(tmp_path / "members.json", members))
    with pytest.raises(
        UserError,
        match="Members differ in where their prompts stand: in front of every row's text for a, b; in each row, by the "
        "text's <prompt> for c; train those that are alike in one population each",
    ):
        prepare_population(run, ())


def test_fp16_by_ds_config(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # on a CPU fp16 is refused in any run
    config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    config = {key: value for key, value in config.items() if key != "bf16"}
    (tmp_path / "half.json").write_text(json.dumps({**config, "fp16": {"enabled": True}}))
    run = RunConfig(model=str(tiny_model), seeds="0-1", ds_config=str(tmp_path / "half.json"))
    with pytest.raises(UserError, match=r"--ds_config .*half\.json enables fp16, which scales one run's loss; use"):
        prepare_population(run, ())


# which folders they may write to


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {file: file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


@pytest.mark.slow
def test_what_a_folder_holds_is_not_written_over(job, tmp_path):
    """By a run of one prompt where several are, by several where one is, or by others than those of before."""
    short = {"max_steps": 1, "eval_every": 1}
    job("one", **short)
    job("several", seeds="0 1", **short)
    before = contents(tmp_path)
    refused = [
        ("one", {"seeds": "0 1"}, None, "holds a run of one prompt; give several prompts a new folder"),
        ("one", {"seeds": "0 1"}, "auto", "holds a run of one prompt; give several prompts a new folder"),
        ("several", {}, None, "holds a run of several prompts; continue it with its --seeds"),
        ("several", {}, "auto", "holds a run of several prompts; continue it with its --seeds"),
        ("several", {"seeds": "2 3"}, None, "holds another run; continue it with --resume auto"),
        ("several", {"seeds": "1 2"}, "auto", "holds a run of seed-0, seed-1, and seed-0 would not be in it any more"),
    ]
    for folder, given, resume, said in refused:
        with pytest.raises(UserError, match=said):
            job(folder, **given, resume=resume, max_steps=2)
        assert contents(tmp_path) == before
    # a member alone, and one more beside those of before
    job("several/members/seed-0", max_steps=2, schedule_steps=2, resume="auto")
    job("several", seeds="0 1", max_steps=2, resume="auto")
    assert len(job("several", seeds="0-2", max_steps=2, resume="auto").members) == 3


def test_a_disk_that_is_full_at_the_first_log_line(job, monkeypatch):
    real = Monitor._write

    def full(monitor, log, group, *args):
        if group == "train":
            raise OSError(errno.ENOSPC, "x")
        real(monitor, log, group, *args)

    monkeypatch.setattr(Monitor, "_write", full)
    with pytest.raises(
        OutputError, match=r"^Can't write to .*seed-0: No space left on device; nothing had been saved yet: "
    ):
        job("both", seeds="0 1", max_steps=1)


# what the table over them says


def test_the_majority_class_has_each_metric(job, tmp_path):
    job("both", task="CB", seeds="0 1", max_steps=1, eval_every=1)
    record = json.loads((tmp_path / "both" / "population.json").read_text())
    gold = [row["label"] for row in load_split(load_task("CB"), "val", None, None).rows]
    answer = max(sorted(set(gold)), key=gold.count)
    wanted = {"accuracy": gold.count(answer) / len(gold),
              "macro_f1": f1_score(gold, [answer] * len(gold), average="macro", zero_division=0.0)}  # fmt: skip
    assert {name: line["majority"] for name, line in record["summary"].items()} == pytest.approx(wanted)
    assert [one["majority"] for one in record["members"]] == [wanted["accuracy"]] * 2


# where they go on


def test_a_job_that_ends_between_two_saves_goes_on(job, tmp_path, monkeypatch):
    """With one checkpoint each: the first member had saved its second one, the other had not."""
    whole, save = job("whole", seeds="0 1"), Trainer.save

    def dies(trainer, progress, *args, **kwargs):
        if progress.step == 10 and trainer.run.seed == 1:
            raise RuntimeError("killed")
        save(trainer, progress, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", dies)
        with pytest.raises(RuntimeError, match="killed"):
            job("half", seeds="0 1", keep_checkpoints=1)
    job("half", seeds="0 1", keep_checkpoints=1, resume="auto")
    for name, member in whole.members.items():
        require_equal(tmp_path / "half" / "members" / name, member.output_dir)
        assert steps_of(tmp_path / "half" / "members" / name) == [20]


@pytest.mark.parametrize("lost", ["a file", pytest.param("all of one", marks=pytest.mark.slow)])
def test_a_step_that_one_has_lost(job, tmp_path, capsys, lost):
    """The step before it is taken, or none where a member has saved nothing."""
    given = {"seeds": "0 1", "save_every": 4, "keep_checkpoints": 3, "verbose": True}
    whole = job("whole", **given)
    job("half", **given, max_steps=10)
    zero, one = (tmp_path / "half" / "members" / name / "checkpoints" for name in ("seed-0", "seed-1"))
    shutil.rmtree(one / "step-000010" if lost == "a file" else one)
    (zero / "step-000008" / "state.safetensors").write_bytes(b"")
    capsys.readouterr()
    job("half", **given, resume="auto")
    told = "".join(capsys.readouterr())
    if lost == "a file":
        assert "is missing or altered (its sha256 differs); going on from a step before" in told
        assert "resumed behind step 4\n" in told
    else:
        assert "warning: seed-1 had saved nothing: all members start anew" in told
        assert "resumed" not in told
    for name, member in whole.members.items():
        require_equal(tmp_path / "half" / "members" / name, member.output_dir)


PATIENCE = [{"name": "still", "lr": 1e-9, "patience": 1}, {"name": "long", "seed": 2}]


@pytest.mark.slow
def test_more_patience_goes_on_from_a_step_that_all_have(job, tmp_path):
    given = {"eval_every": 4, "population": written(tmp_path / "members.json", PATIENCE)}
    job("half", **given, max_steps=10)
    assert [steps_of(tmp_path / "half" / "members" / name) for name in ("still", "long")] == [[5, 8], [5, 10]]
    patient = [{**PATIENCE[0], "patience": 9}, PATIENCE[1]]
    given["population"] = written(tmp_path / "patient.json", patient)
    job("half", **given, resume="auto")
    whole = job("whole", **given)
    for name, member in whole.members.items():
        require_equal(tmp_path / "half" / "members" / name, member.output_dir)


def test_members_without_a_step_in_common(job, tmp_path):
    given = {"eval_every": 4, "keep_checkpoints": 1, "population": written(tmp_path / "members.json", PATIENCE)}
    job("run", **given, max_steps=10)
    given["population"] = written(tmp_path / "patient.json", [{**PATIENCE[0], "patience": 9}, PATIENCE[1]])
    with pytest.raises(UserError, match=r"there is no step that all members have saved \(still 8; long 10\); put"):
        job("run", **given, resume="auto")


@pytest.mark.slow
def test_a_member_that_ended_later_lends_the_others_no_step_of_adam(job, tmp_path):
    """It had ended at step 8, and the others go on from step 5."""
    given = {"eval_every": 4, "population": written(tmp_path / "members.json", PATIENCE)}
    job("half", **given, max_steps=9)
    (tmp_path / "half/members/long/checkpoints/step-000009").rename(tmp_path / "lost")
    job("half", **given, resume="auto")
    whole = job("whole", **given)
    ours, theirs = (state_of(folder / "members" / "long", 20) for folder in (tmp_path / "half", whole.output_dir))
    assert float(ours["adam_step"]) == float(theirs["adam_step"]) == 20
    assert distance(ours["prompt"], theirs["prompt"]) < 1e-5  # steps 6 to 8 had company
    assert steps_of(tmp_path / "half" / "members" / "still") == [5, 8]


@pytest.mark.slow
def test_a_member_that_a_callback_ended_stays_so(job, tmp_path, capsys):
    def stop(line: dict) -> None:
        if line["member"] == "seed-1" and (line["kind"], line["step"]) == ("train", 3):
            raise ptp_ds.StopRun

    whole = job("whole", seeds="0 1", callbacks=[stop])
    job("half", seeds="0 1", max_steps=10, callbacks=[stop], verbose=True)
    told = capsys.readouterr().out
    assert "step 3  by a callback, ended: seed-1\n" in told
    assert "patience" not in told
    again = job("half", seeds="0 1", resume="auto")
    require_equal(again.members["seed-0"].output_dir, whole.members["seed-0"].output_dir)
    assert [one.record["steps"] for one in again.members.values()] == [20, 3]
    alone = job("half/members/seed-1", seed=1, resume="auto")
    assert alone.record["steps"] == 20, "its folder is a run's, which goes on"
