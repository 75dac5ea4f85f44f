"""What a population's members must share, where they go on, and one that ends or whose numbers are not finite."""

import errno
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.metrics import f1_score

import ptp_ds
from ptp_ds.commands import one_run, population
from ptp_ds.commands.members import prepare_population
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.ranks.faults import OutputError
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import load_split
from ptp_ds.training import step
from ptp_ds.training.checkpoint import saved_steps
from ptp_ds.training.engine import Engine
from ptp_ds.training.monitor import Monitor
from ptp_ds.training.trainer import NonFiniteLossError, Trainer
from tests.support.paths import ROOT
from tests.support.populations import distance, state_of
from tests.support.runs import adapter

RUN = {"task": "COPA", "prompt_length": 4, "batch_size": 4, "max_steps": 20, "schedule_steps": 20, "eval_every": 10,
       "save_every": 5, "eval_tokens": 600, "lr": 0.05, "log_every": 1, "perturbation": "gaussian",
       "verbose": False}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """A process group that another test left in the environment is not this program's."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def job(tiny_model, tmp_path):
    """job(folder, **settings): ptp_ds.train with RUN's settings and these."""

    def train(folder: str, **settings):
        return ptp_ds.train(model=tiny_model, output_dir=tmp_path / folder, **{**RUN, **settings})

    return train


def written(file: Path, members: list[dict]) -> str:
    file.write_text(json.dumps(members))
    return str(file)


def steps_of(folder: Path) -> list[int]:
    """Without those that were set aside."""
    return saved_steps(folder / "checkpoints")


def require_equal(ours: Path, theirs: Path) -> None:
    """Bit for bit, at the last step."""
    mine = state_of(ours, 20)
    for name, tensor in state_of(theirs, 20).items():
        assert torch.equal(mine[name], tensor), name


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


def test_a_failure_is_forgotten_where_nothing_was_saved(job, tmp_path, monkeypatch):
    """A job that starts anew may have other settings; here the member that failed has another learning rate."""
    given = {"max_steps": 4, "schedule_steps": 4, "eval_every": 4, "save_every": 4, "resume": "auto"}

    def dies(*args, **kwargs):
        raise RuntimeError("killed")

    def members(lr: float) -> str:
        both = [{"name": "good", "seed": 1}, {"name": "bad", "lr": lr, "warmup_steps": 0}]
        return written(tmp_path / "members.json", both)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", dies)
        with pytest.raises(RuntimeError, match="killed"):
            job("all", population=members(1e38), **given)
    failed = tmp_path / "all" / "members" / "bad" / "failed.json"
    assert "not finite" in failed.read_text()
    again = job("all", population=members(0.05), **given)
    assert [(one["failed"], one["steps"]) for one in again.record["members"]] == [(None, 4)] * 2
    assert not failed.exists()


def test_a_member_that_failed_keeps_its_prompt_and_results(job, tmp_path, monkeypatch):
    """It had scored a prompt and saved none, and the others go on from a step behind its failure."""
    given = {"seeds": "0 1", "max_steps": 4, "eval_every": 2, "save_every": 4}
    said, real = "The loss is not finite at step 3", Trainer.log

    def breaks(trainer, progress, *args):
        if (trainer.run.seed, progress.step) == (1, 3):
            raise NonFiniteLossError(f"{said}; nothing was saved")
        real(trainer, progress, *args)

    monkeypatch.setattr(Trainer, "log", breaks)
    folder, seen = tmp_path / "run" / "members" / "seed-1", []
    for steps in (4, 6):
        record = job("run", **{**given, "max_steps": steps}, resume="auto").record["members"][1]
        assert (record["failed"], record["steps"], record["best_step"]) == (said, 3, 2)
        result = json.loads((folder / "result.json").read_text())
        assert (result["steps"], result["metrics"]) == (3, record["metrics"])
        seen.append((record["metrics"], adapter(folder).tolist()))
    assert seen[0] == seen[1]
    assert not list(folder.glob("*.left"))
    (folder / "kept.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"kept\.safetensors is missing or altered .*; put a copy back or start anew"):
        job("run", **{**given, "max_steps": 6}, resume="auto")


@pytest.mark.parametrize("alone", [3, 4, 6])
def test_a_member_that_failed_and_went_on_alone_has_not_failed(job, tmp_path, monkeypatch, alone):
    """Its own end is its result: behind the failure's step, or at it, where the last evaluation had failed."""
    given, real, broken = {"max_steps": 6, "eval_every": 2, "save_every": 2}, Trainer.log, []

    def breaks(trainer, progress, *args):
        if (trainer.run.seed, progress.step) == (1, alone) and not broken:
            broken.append(True)
            raise NonFiniteLossError("The loss is not finite")
        real(trainer, progress, *args)

    monkeypatch.setattr(Trainer, "log", breaks)
    assert job("run", **given, seeds="0 1").record["members"][1]["failed"] == "The loss is not finite"
    folder = tmp_path / "run" / "members" / "seed-1"
    job("run/members/seed-1", **given, seed=1, resume="auto")
    lone = json.loads((folder / "result.json").read_text())
    assert lone["steps"] == 6
    record = job("run", **given, seeds="0 1", resume="auto").record["members"][1]
    assert (record["failed"], record["steps"], record["metrics"]) == (None, 6, lone["metrics"])
    assert not (folder / "failed.json").exists()


@pytest.mark.parametrize("lost", ["a file", "all of one"])
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


# gradients that are not finite


def test_a_gradient_that_is_not_finite_ends_a_member_as_its_own_run(job, tmp_path, monkeypatch):
    """The loss is: a square root of 0 times it is added, whose derivative is infinity times 0."""
    bad, real = 0.75, step.dual_divergence

    def broken(*args, reg_weight, **kwargs):
        total, *others = real(*args, reg_weight=reg_weight, **kwargs)
        return (total + (total * 0.0).sqrt() if reg_weight == bad else total, *others)

    monkeypatch.setattr(step, "dual_divergence", broken)
    members = [{"name": "good", "seed": 1}, {"name": "bad", "reg_weight": bad}, {"name": "fine", "seed": 2}]
    said = r"The prompt's gradient is not finite at step 1; nothing was saved .*\. Start anew in another --output_dir"
    with pytest.raises(UserError, match=said) as told:
        job("alone", reg_weight=bad)
    together = job("all", population=written(tmp_path / "members.json", members))
    sentences = [one["failed"] for one in together.record["members"]]
    assert sentences == [None, str(told.value).split(";")[0], None]
    good = job("good", seed=1)
    ours, theirs = (state_of(folder, 20) for folder in (together.members["good"].output_dir, good.output_dir))
    assert distance(ours["prompt"], theirs["prompt"]) < 1e-5


def test_a_member_beyond_all_numbers_beside_others_that_a_network_makes(job, tmp_path):
    """Its network's own gradient is not finite either, which would leave out the step of all."""
    members = [{"name": "good", "seed": 1}, {"name": "bad", "lr": 1e38, "warmup_steps": 0}]
    given = {"prompt_mlp": 8, "prompt": "soft"}
    together = job("all", population=written(tmp_path / "members.json", members), **given)
    assert "not finite" in together.record["members"][1]["failed"]
    good = job("good", seed=1, **given)
    ours, theirs = (state_of(folder, 20) for folder in (together.members["good"].output_dir, good.output_dir))
    assert float(theirs["adam_step"]) == float(ours["adam_step"]) == 20
    assert distance(ours["prompt"], theirs["prompt"]) < 1e-5


# scores that are not finite


def test_a_selection_score_that_is_not_finite_is_no_score(job, tmp_path, monkeypatch):
    """Nothing of its step is kept or saved; of several prompts it is that one which ends."""
    real = Engine.kept

    def kept(engine):
        """Of several prompts the last is broken, or the lone one; each has 4 rows."""
        prompts = real(engine)
        prompts[-4:] = math.nan
        return prompts

    monkeypatch.setattr(Engine, "kept", kept)
    said = "The cross-entropy on the selection rows is not finite at step 1"
    given = {"max_steps": 1, "eval_every": 1}
    with pytest.raises(NonFiniteLossError, match=f"^{said}; nothing was saved after the last checkpoint"):
        job("alone", **given)
    assert steps_of(tmp_path / "alone") == []
    assert not (tmp_path / "alone" / "adapter").exists()
    together = job("all", seeds="0 1", **given)
    assert [one["failed"] for one in together.record["members"]] == [None, said]
    assert [one["metrics"] is None for one in together.record["members"]] == [False, True]
    assert [steps_of(tmp_path / "all" / "members" / name) for name in ("seed-0", "seed-1")] == [[1], []]


def test_a_last_score_that_is_not_finite_is_no_result(job, tmp_path, monkeypatch):
    """Seed 0's, on the rows that are reported."""
    real = one_run.report_run

    def broken(prepared, trainer, progress, result, untrained):
        bad = replace(result, cross_entropy=math.nan) if prepared.run.seed == 0 else result
        return real(prepared, trainer, progress, bad, untrained)

    monkeypatch.setattr(one_run, "report_run", broken)
    monkeypatch.setattr(population, "report_run", broken)
    said = "The cross-entropy on the --eval_split rows is not finite at step 1"
    given = {"max_steps": 1, "eval_every": 1}
    with pytest.raises(NonFiniteLossError, match=f"^{said};"):
        job("alone", **given)
    together = job("all", seeds="0 1", **given)
    assert [one["failed"] for one in together.record["members"]] == [said, None]
    assert [one["metrics"] is None for one in together.record["members"]] == [True, False]
    for folder in (tmp_path / "alone", tmp_path / "all" / "members" / "seed-0"):
        assert not (folder / "adapter").exists()
        assert not (folder / "result.json").exists()
