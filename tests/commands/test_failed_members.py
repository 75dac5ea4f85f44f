"""A population's members that fail, or whose numbers are not finite: the others go on, and it may go on alone."""

import json
import math
from dataclasses import replace

import pytest

from ptp_ds.commands import one_run, population
from ptp_ds.errors import UserError
from ptp_ds.training import step
from ptp_ds.training.engine import Engine
from ptp_ds.training.trainer import NonFiniteLossError, Trainer
from tests.support.populations import distance, state_of, steps_of, written
from tests.support.runs import adapter

pytestmark = pytest.mark.usefixtures("no_launcher")


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


@pytest.mark.parametrize("alone", [pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 6])
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


@pytest.mark.slow
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
