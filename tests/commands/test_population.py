"""scripts/train.py --seeds and --population: every member is the run that it would be alone, on disk, too."""

import json
import re
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ptp_ds.config.population import VARIED, members_of
from ptp_ds.config.run_config import RunConfig
from tests.support.paths import SUPPORT
from tests.support.populations import QUICK, distance, require_same, state_of
from tests.support.runs import check
from tests.support.zygote import run_script

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("none", "mask", "a2t", "free")]


@pytest.mark.parametrize("perturbation", ["gaussian", *SLOW, pytest.param("pgd", marks=pytest.mark.slow)])
def test_seeds_at_once_equal_lone_runs(run_train, tiny_model, lively_model, tmp_path, perturbation):
    """On the tiny model's own weights a divergence is now and then rounding, and where an ascent goes follows it."""
    model = lively_model if perturbation in ("free", "pgd") else tiny_model
    args = [*QUICK, "--model", model, "--perturbation", perturbation]
    done = check(run_train([*args, "--seeds", "0-1", "5", "--output_dir", tmp_path / "all"]))
    names = ("seed-0", "seed-1", "seed-5")
    assert sorted(folder.name for folder in (tmp_path / "all" / "members").iterdir()) == sorted(names)
    for name in names[1:]:
        check(run_train([*args, "--seed", name[5:], "--output_dir", tmp_path / name]))
        require_same(tmp_path / "all" / "members" / name, tmp_path / name)
    record = json.loads((tmp_path / "all" / "population.json").read_text())
    results = [json.loads((tmp_path / "all" / "members" / name / "result.json").read_text()) for name in names]
    scores = [result["metrics"]["accuracy"] for result in results]
    found = record["summary"]["accuracy"]
    assert found["mean"] == pytest.approx(sum(scores) / 3)
    assert (found["min"], found["max"], found["failed"], found["members"]) == (min(scores), max(scores), 0, 3)
    assert [(one["name"], one["settings"]["seed"]) for one in record["members"]] == list(
        zip(names, (0, 1, 5), strict=True)
    )
    for one, result in zip(record["members"], results, strict=True):
        assert (one["metrics"], one["untrained"]) == (result["metrics"], result["untrained"])
    assert re.search(r"^accuracy +3 +0 +0\.", done.stdout, re.MULTILINE)
    assert "failed: none" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("perturbation", "ranks"), [("free", 1), ("pgd", 2)])
def test_micro_batches_of_all_members_one_after_the_other(run_train, lively_model, tmp_path, perturbation, ranks):
    """A lone run that takes them side by side is the reference."""
    args = [*QUICK, "--model", lively_model, "--perturbation", perturbation, "--gradient_accumulation_steps", "2"]
    depth = ["--schedule", "depth", "--seeds", "0", "5", "--output_dir", tmp_path / "all"]
    check(run_train([*args, *depth], nproc=ranks))
    check(run_train([*args, "--seed", "5", "--output_dir", tmp_path / "alone"], nproc=ranks))
    require_same(tmp_path / "all" / "members" / "seed-5", tmp_path / "alone")


@pytest.mark.parametrize(
    "perturbation", ["free", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mask", "a2t"))]
)
def test_seeds_at_once_equal_lone_runs_on_two_ranks(run_train, lively_model, tmp_path, perturbation):
    """On the tiny model's own weights a divergence is now and then rounding, and where an ascent goes follows it."""
    args = [*QUICK, "--model", lively_model, "--perturbation", perturbation]
    check(run_train([*args, "--seeds", "0", "5", "--output_dir", tmp_path / "all"], nproc=2))
    check(run_train([*args, "--seed", "5", "--output_dir", tmp_path / "alone"], nproc=2))
    require_same(tmp_path / "all" / "members" / "seed-5", tmp_path / "alone")


MEMBERS = [
    {"name": "copa", "task": "COPA", "prompt_length": 4, "lr": 0.02, "sigma": 0.5, "min_confidence": 0.51},
    {
        "name": "reviews",
        "task": "Reviews",
        "seed": 3,
        "reg_weight": 0.5,
        "divergence": "js",
        "reg_schedule": "linear",
        "min_confidence": 0.502,
        "confidence_in": "label",
    },
]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_tasks_and_settings_of_their_own(run_train, tiny_model, tmp_path, ranks):
    (tmp_path / "members.json").write_text(json.dumps(MEMBERS))
    args = [*QUICK, "--model", tiny_model]
    check(run_train([*args, "--population", tmp_path / "members.json", "--output_dir", tmp_path / "all"], nproc=ranks))
    for member in MEMBERS:
        own = [word for name, value in member.items() if name != "name" for word in (f"--{name}", str(value))]
        given = [*args, *own, "--output_dir", tmp_path / member["name"]]
        check(run_train(given, nproc=ranks))
        require_same(tmp_path / "all" / "members" / member["name"], tmp_path / member["name"])


@pytest.mark.slow
@pytest.mark.parametrize("perturbation", ["pgd", *SLOW])
def test_one_member_is_the_run_bit_for_bit(run_train, tiny_model, tmp_path, perturbation):
    args = [*QUICK, "--model", tiny_model, "--perturbation", perturbation, "--weight_decay", "0.1"]
    check(run_train([*args, "--seeds", "3", "--output_dir", tmp_path / "all"]))
    check(run_train([*args, "--seed", "3", "--output_dir", tmp_path / "alone"]))
    ours, theirs = (state_of(folder, 20) for folder in (tmp_path / "all" / "members" / "seed-3", tmp_path / "alone"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_stopped_population_goes_on_as_if_it_had_not(run_train, tiny_model, tmp_path):
    """Also where one member had saved a step that another had not."""
    args = [*QUICK, "--model", tiny_model, "--perturbation", "free", "--seeds", "0", "1"]
    check(run_train([*args, "--output_dir", tmp_path / "whole"]))
    half = [*args, "--output_dir", tmp_path / "half", "--schedule_steps", "20", "--save_every", "5"]
    check(run_train([*half, "--max_steps", "10"]))
    shutil.rmtree(tmp_path / "half" / "members" / "seed-1" / "checkpoints" / "step-000010")
    for name in ("seed-0", "seed-1"):
        for left in ("adapter", "result.json"):
            path = tmp_path / "half" / "members" / name / left
            path.unlink() if path.is_file() else shutil.rmtree(path)
    done = check(run_train([*half, "--max_steps", "20", "--resume", "auto"]))
    assert "resumed behind step 5\n" in done.stdout
    for name in ("seed-0", "seed-1"):
        ours, theirs = (tmp_path / run / "members" / name for run in ("half", "whole"))
        for key, tensor in state_of(theirs, 20).items():
            assert torch.equal(state_of(ours, 20)[key], tensor), key


@pytest.mark.slow
def test_patience_ends_a_member_and_the_others_go_on(run_train, tiny_model, tmp_path):
    """One that learns nothing ends behind two evaluations; it stays so where the job is resumed, the other goes on."""
    members = [{"name": "still", "lr": 1e-9, "patience": 1, "weight_decay": 0.0}, {"name": "long", "seed": 2}]
    (tmp_path / "members.yaml").write_text(json.dumps(members))
    args = [*QUICK, "--model", tiny_model, "--eval_every", "4", "--schedule_steps", "20"]
    job = [*args, "--population", tmp_path / "members.yaml", "--output_dir", tmp_path / "all"]
    done = check(run_train([*job, "--max_steps", "10"]))
    assert "step 8  without a higher score for --patience evaluations, ended: still" in done.stdout
    again = check(run_train([*job, "--resume", "auto"]))
    assert "resumed behind step 10\n" in again.stdout
    check(run_train([*args, "--seed", "2", "--output_dir", tmp_path / "long"]))
    ours, theirs = (state_of(folder, 20) for folder in (tmp_path / "all" / "members" / "long", tmp_path / "long"))
    assert distance(ours["prompt"], theirs["prompt"]) < 1e-5
    lone = [*args, "--lr", "1e-9", "--output_dir", tmp_path / "still"]
    told = check(run_train([*lone, "--patience", "1"])).stdout
    assert "step 8  1 evaluations without a higher score: training ends here" in told
    ours, theirs = (json.loads((folder / "result.json").read_text())
                    for folder in (tmp_path / "all" / "members" / "still", tmp_path / "still"))  # fmt: skip
    assert (ours["steps"], ours["best_step"], ours["metrics"]) == (8, 8, theirs["metrics"])
    more = check(run_train([*lone, "--patience", "2", "--resume", "auto"])).stdout
    assert "step 12  2 evaluations without a higher score: training ends here" in more


@pytest.mark.slow
def test_a_member_that_fails_leaves_the_others_as_they_are(run_train, tiny_model, tmp_path):
    """Its learning rate takes it beyond all numbers; it is reported, and stays so where the job is resumed."""
    members = [{"name": "good", "seed": 1}, {"name": "bad", "lr": 1e38, "warmup_steps": 0}, {"name": "fine", "seed": 2}]
    (tmp_path / "members.json").write_text(json.dumps(members))
    args = [*QUICK, "--model", tiny_model]
    job = [*args, "--population", tmp_path / "members.json", "--output_dir", tmp_path / "all"]
    done = check(run_train([*job, "--max_steps", "10", "--schedule_steps", "20"]))
    assert "warning: member bad: The " in done.stderr + done.stdout
    assert done.stdout.count("failed: bad (The ") == 1
    again = check(run_train([*job, "--schedule_steps", "20", "--resume", "auto"]))
    assert "resumed behind step 10\n" in again.stdout
    assert again.stdout.count("failed: bad (The ") == 1
    for name, seed in (("good", "1"), ("fine", "2")):
        check(run_train([*args, "--seed", seed, "--output_dir", tmp_path / name]))
        require_same(tmp_path / "all" / "members" / name, tmp_path / name)
    record = json.loads((tmp_path / "all" / "population.json").read_text())
    bad = record["members"][1]
    assert (bad["name"], "not finite" in bad["failed"], bad["steps"] < 20) == ("bad", True, True)
    assert record["summary"]["accuracy"]["failed"] == 1
    assert (tmp_path / "all" / "members" / "bad" / "config.json").is_file()


def test_a_job_without_steps_left_keeps_its_bands(run_train, tiny_model, tmp_path):
    """As one does that was killed in its last evaluation: what TensorBoard shows of its training stays."""
    job = [*QUICK, "--model", tiny_model, "--seeds", "0-1", "--max_steps", "2", "--output_dir", tmp_path / "all"]

    def shown() -> dict[str, list[tuple[int, float]]]:
        board = EventAccumulator(str(tmp_path / "all" / "tensorboard")).Reload()
        return {tag: [(event.step, event.value) for event in board.Scalars(tag)]
                for tag in board.Tags()["scalars"] if not tag.startswith("members/eval")}  # fmt: skip

    check(run_train(job))
    before = shown()
    assert {step for points in before.values() for step, _ in points} == {2}
    shutil.rmtree(tmp_path / "all" / "members" / "seed-1" / "adapter")
    (tmp_path / "all" / "population.json").unlink()
    assert "resumed behind step 2\n" in check(run_train([*job, "--resume", "auto"])).stdout
    assert shown() == before
    assert (tmp_path / "all" / "population.json").is_file()


BROKEN = "The prompt's gradient is not finite at step 2"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(3, 1), (2, 2)])
def test_a_gradient_that_is_not_finite_between_two_log_lines(tiny_model, tmp_path, stage, ranks):
    """Step 2 of 10, where 5 and 10 are logged: the optimizer leaves it out, and every later step is a whole one."""
    args = [*QUICK, "--model", tiny_model, "--max_steps", "10", "--ds_config", f"ds_configs/zero{stage}.json"]

    def run(name, *given, step=2, rows=(0, 5)):
        own = [step, *rows, *args, "--output_dir", tmp_path / name, *given]
        return run_script(SUPPORT / "poisoned_train.py", own, tmp_path, ranks)

    for name, given in (("alone", ["--seed", "1"]), ("lone member", ["--seeds", "1"])):
        done = run(name, *given)
        assert BROKEN in done.stderr + done.stdout
        assert done.returncode == (2 if name == "alone" else 0)
    assert not list((tmp_path / "alone" / "checkpoints").glob("*"))
    told = check(run("all", "--seeds", "0-2", rows=(5, 10))).stdout
    assert f"failed: seed-1 ({BROKEN})" in told
    record = json.loads((tmp_path / "all" / "population.json").read_text())
    assert [(one["failed"], one["steps"]) for one in record["members"]] == [(None, 10), (BROKEN, 5), (None, 10)]
    check(run("whole", "--seed", "2", step=0))
    ours, theirs = (state_of(folder, 10) for folder in (tmp_path / "all" / "members" / "seed-2", tmp_path / "whole"))
    assert distance(ours["prompt"], theirs["prompt"]) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": "0 x"}, "--seeds '0 x': 'x' is no seed; expected numbers and ranges such as 0-9"),
        ({"seeds": "3-1"}, "'3-1' is no seed"),
        ({"seeds": "1 0-2"}, "expected 1 to 1000 seeds, each once"),
        ({"seeds": "0-99999"}, "is no seed"),
        ({"seeds": "0", "population": "f"}, "--seeds and --population both say who the members are"),
        ({"seeds": "0", "resume": "runs/x"}, "--resume of several prompts is auto"),
        ({"seeds": "0", "precision": "fp16"}, "--precision fp16 scales one run's loss"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        members_of(RunConfig(**settings))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "expected a list of 1 to 1000 members"),
        ([], "expected a list of 1 to 1000 members"),
        ([{"seed": 1}], r"member 1 is \{'seed': 1\}; expected an object with a name"),
        ([{"name": "a/b"}], "the name of member 1"),
        ([{"name": "a"}, {"name": "a"}], "two members are named 'a'"),
        ([{"name": "a", "sead": 1}], r"unknown key 'sead' \(did you mean 'seed'\?\)"),
        ([{"name": "a", "model": "x"}], "a: --model is the same for all members"),
        ([{"name": "a", "lr": "x"}], "a: 'lr' must be float, not 'x'"),
        ([{"name": "a", "divergence": "x"}], "a: 'divergence' is 'x'; choose from kl"),
        ([{"name": "a", "lr": 0}], "Member a: --lr is 0.0; expected a finite number above 0"),
        ([{"name": "a", "sigma": 0}, {"name": "b"}], "Members a have no perturbation"),
    ],
)
def test_wrong_members(tmp_path, members, message):
    (tmp_path / "members.json").write_text(json.dumps(members))
    with pytest.raises(ValueError, match=message):
        members_of(RunConfig(population=str(tmp_path / "members.json")))


def test_members_are_the_flags_and_what_differs(tmp_path):
    (tmp_path / "members.json").write_text(json.dumps(MEMBERS))
    found = members_of(RunConfig(population=str(tmp_path / "members.json"), lr=0.5, output_dir="runs/x"))
    assert found["copa"] == RunConfig(task="COPA", prompt_length=4, lr=0.02, sigma=0.5, min_confidence=0.51)
    own = {name: value for name, value in MEMBERS[1].items() if name != "name"}
    assert found["reviews"] == RunConfig(**{"lr": 0.5, **own})
    assert set(VARIED) <= set(vars(RunConfig()))


def test_a_seed_beside_seeds_is_refused_and_warnings_are_heard_once(run_train, tiny_model, tmp_path):
    args = [*QUICK, "--model", tiny_model, "--seeds", "0-2"]
    done = run_train([*args, "--seed", "3", "--output_dir", tmp_path / "run"])
    assert done.returncode == 2
    assert "error: --seed and --seeds both say which seeds train; give one of them." in done.stderr
    assert not (tmp_path / "run").exists()
    told = run_train(
        [*args, "--perturbation", "none", "--sigma", "2", "--max_steps", "1", "--output_dir", tmp_path / "run"]
    )
    assert (check(told).stdout + told.stderr).count("--sigma has no effect with --perturbation none") == 1
