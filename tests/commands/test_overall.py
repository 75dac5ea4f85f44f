"""The overall score: means over seeds and tasks by hand, what is kept apart, what is missing, every message."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ptp_ds.commands.overall import TASKS, group_results, main, read_result, spread, table_of, table_text
from ptp_ds.config.run_config import RunConfig
from ptp_ds.tasks import builtin_tasks
from tests.support.paths import ROOT
from tests.support.processes import child_environment


@pytest.fixture
def run(tmp_path):
    """run(task, seed, **changes) writes a result.json as train.py does and returns its folder."""

    def write(task: str = "CB", seed: int = 0, folder: str | None = None, **changes) -> str:
        target = tmp_path / (folder or f"{task}-{seed}")
        target.mkdir(exist_ok=True)
        result = {
            "task": task, "model": "small", "perturbation": "pgd", "prompt": "soft", "seed": seed, "eval_split": "val",
            "metrics": {"accuracy": 0.5}, "steps": 3, **changes,
        }  # fmt: skip
        kept = {key: value for key, value in result.items() if value is not ...}
        (target / "result.json").write_text(json.dumps(kept), encoding="utf-8")
        return str(target)

    return write


def tables(*folders: str) -> list[dict]:
    return [table_of(*found) for found in group_results(map(read_result, folders))]


def test_the_eight_tasks_and_the_diagnostics_are_ours():
    assert {*TASKS, "AX-b", "AX-g", "Reviews"} == set(builtin_tasks())


def test_means_over_seeds_and_tasks(run):
    """CB's scores are (0.6 + 0.4) / 2 and (0.8 + 0.6) / 2; the overall score is the mean of 0.6 and RTE's 0.9."""
    folders = [
        run("RTE", 0, metrics={"accuracy": 0.9}),
        run("CB", 1, metrics={"accuracy": 0.8, "macro_f1": 0.6}),
        run("CB", 0, metrics={"accuracy": 0.6, "macro_f1": 0.4}),
        run("AX-b", 0, metrics={"matthews": -0.5}),
    ]
    (table,) = tables(*folders)
    assert list(table["tasks"]) == ["CB", "RTE", "AX-b"]
    cb = table["tasks"]["CB"]
    assert cb["seeds"] == [0, 1]
    assert cb["score"] == {"mean": pytest.approx(0.6), "std": pytest.approx(0.2 / 2**0.5)}
    assert cb["metrics"]["macro_f1"] == {"mean": pytest.approx(0.5), "std": pytest.approx(0.2 / 2**0.5)}
    assert table["overall"] == pytest.approx(0.75)
    assert table["missing"] == ["BoolQ", "COPA", "MultiRC", "ReCoRD", "WiC", "WSC"]
    lines = table_text(table).splitlines()
    assert lines[0] == "small | pgd | soft"
    assert " ".join(lines[1].split()) == (
        "CB 2 seeds score 0.6000 +- 0.1414 accuracy 0.7000 +- 0.1414 macro_f1 0.5000 +- 0.1414"
    )
    assert lines[3].endswith("matthews -0.5000  (not in the mean)")
    assert lines[4] == "  partial mean of 2 of 8 tasks: 0.7500  (missing: BoolQ, COPA, MultiRC, ReCoRD, WiC, WSC)"


def test_all_eight_tasks_make_the_score(run):
    folders = [run(task, 0, metrics={"accuracy": number / 10}) for number, task in enumerate(TASKS)]
    (table,) = tables(*folders, run("AX-g", 0, metrics={"accuracy": 1.0}))
    assert table["missing"] == []
    assert table["overall"] == pytest.approx(0.35)
    assert table_text(table).endswith("  SuperGLUE score: 0.3500")


def test_one_seed_has_no_deviation():
    assert spread([0.25]) == {"mean": 0.25, "std": None}


@pytest.mark.parametrize("change", [{"model": "large"}, {"perturbation": "none"}, {"prompt": "deep"}])
def test_other_settings_get_a_table_of_their_own(run, change):
    found = tables(run(seed=0), run(seed=0, folder="other", **change), run(seed=1))
    assert [table["tasks"]["CB"]["seeds"] for table in found] == [[0, 1], [0]]


def test_a_sweep_is_a_table_a_setting_with_seeds_within(run):
    """lr differs between runs of CB; the batch size only between tasks, so it tells no tables apart."""
    folders = [
        run(task, seed, f"{task}-{seed}-{lr}", settings={"lr": lr, "batch_size": 8 + len(task), "seed": seed,
                                                         "output_dir": f"{lr}-{seed}", "log_every": seed + 1})
        for task in ("CB", "COPA") for lr in (0.03, 0.1) for seed in (0, 1)
    ]  # fmt: skip
    found = tables(*folders)
    assert [table["settings"] for table in found] == [{"lr": "0.03"}, {"lr": "0.1"}]
    assert [{task: kept["seeds"] for task, kept in table["tasks"].items()} for table in found] == (
        [{"CB": [0, 1], "COPA": [0, 1]}] * 2
    )
    assert table_text(found[1]).startswith("small | pgd | soft | lr 0.1\n")


def test_older_results_take_their_settings_from_config_json(run, tmp_path):
    folders = [run(seed=0), run(seed=0, folder="other", settings={"lr": 0.1})]
    with open(f"{folders[0]}/config.json", "w") as file:
        json.dump({"run": {"lr": 0.03, "seed": 0}}, file)
    assert [table["settings"] for table in tables(*folders)] == [{"lr": "0.03"}, {"lr": "0.1"}]
    (tmp_path / "other" / "result.json").write_text((tmp_path / "CB-0" / "result.json").read_text())
    assert [table["settings"] for table in tables(*folders)] == [{"settings": "told"}, {"settings": "not told"}]


def all_settings(**changes) -> dict:
    return dataclasses.asdict(RunConfig(**changes))


def test_a_heading_names_only_what_differs(run):
    """Beside a run whose settings aren't known at all, and one of a version that had fewer of them."""
    older = all_settings(seed=1, divergence_gradient="both")
    del older["schedule_steps"], older["divergence_gradient"]
    found = tables(
        run(seed=0, settings=all_settings(divergence_gradient="both")), run(seed=1, settings=older),
        run(seed=0, folder="bare"),
        run(seed=2, settings=all_settings(seed=2, divergence_gradient="both", schedule_steps=RunConfig().max_steps,
                                          output_dir="runs/x", resume="auto")),
    )  # fmt: skip
    assert [(table["settings"], table["tasks"]["CB"]["seeds"]) for table in found] == [
        ({"settings": "told"}, [0, 1, 2]), ({"settings": "not told"}, [0]),
    ]  # fmt: skip


def test_a_whole_number_on_record_is_the_float_that_it_stands_for(run):
    """As a settings file or a population's member had it."""
    folders = [run(seed=seed, settings={**all_settings(), "reg_weight": (1, 1.0, 2)[seed]}) for seed in range(3)]
    assert [(table["settings"], table["tasks"]["CB"]["seeds"]) for table in tables(*folders)] == [
        ({"reg_weight": "1.0"}, [0, 1]), ({"reg_weight": "2.0"}, [2]),
    ]  # fmt: skip


def test_a_warm_up_that_is_the_default_of_its_schedule_is_the_default(run):
    folders = [
        run(seed=seed, settings=all_settings(warmup_steps=warmup, max_steps=150, schedule_steps=schedule))
        for seed, (warmup, schedule) in enumerate([(None, 150), (30, 150), (30, None), (5, None)])
    ]
    assert [(table["settings"], table["tasks"]["CB"]["seeds"]) for table in tables(*folders)] == [
        ({"warmup_steps": "None"}, [0, 1, 2]), ({"warmup_steps": "5"}, [3]),
    ]  # fmt: skip


def test_weights_that_are_gathered_as_int8_are_another_models(run):
    """config.json has the resolved DeepSpeed configuration; another stage alone makes no difference."""
    folders = [run(seed=seed, settings=all_settings(seed=seed)) for seed in range(4)]
    configs = [{"stage": 3}, {"stage": 2}, {"stage": 3, "zero_quantized_weights": True}]
    for folder, zero in zip(folders, configs, strict=False):
        (Path(folder) / "config.json").write_text(json.dumps({"deepspeed": {"zero_optimization": zero}}))
    assert [(table["settings"], table["tasks"]["CB"]["seeds"]) for table in tables(*folders)] == [
        ({"weights_gathered": "as stored"}, [0, 1, 3]), ({"weights_gathered": "as int8"}, [2]),
    ]  # fmt: skip


def test_data_count_by_their_rows_and_not_by_their_path(run):
    """config.json holds the hash for results that don't."""
    folders = [
        run(seed=seed, settings=all_settings(seed=seed, data_dir=path), training_data_sha256=digest)
        for seed, (path, digest) in enumerate([("a", "1" * 64), ("./a", "1" * 64), ("b", "2" * 64)])
    ]
    older = run(seed=3, settings=all_settings(seed=3))
    with open(f"{older}/config.json", "w") as file:
        json.dump({"training_data_sha256": "2" * 64}, file)
    assert [(table["settings"], table["tasks"]["CB"]["seeds"]) for table in tables(*folders, older)] == [
        ({"training_data_sha256": "11111111"}, [0, 1]), ({"training_data_sha256": "22222222"}, [2, 3]),
    ]  # fmt: skip


def test_templates_of_one_task_have_tables_of_their_own(run):
    """Told by their names, which are those of other tasks' templates, too; AX-b's record is of an adapter of RTE."""
    folders = [
        run(task, seed, f"{task}{variant}-{seed}", settings=all_settings(seed=seed, task=f"{task}{variant}"))
        for task in ("CB", "RTE") for variant in ("", ".pet") for seed in (0, 1)
    ]  # fmt: skip
    for folder in folders[::2]:  # the others tell no template, as older ones
        (Path(folder) / "config.json").write_text(json.dumps({"task": {"text": Path(folder).name[:-2]}}))
    found = tables(*folders)
    assert [table["settings"] for table in found] == [{"template": "named as the task"}, {"template": "pet"}]
    assert [{task: kept["seeds"] for task, kept in table["tasks"].items()} for table in found] == (
        [{"CB": [0, 1], "RTE": [0, 1]}] * 2
    )
    assert table_text(found[1]).startswith("small | pgd | soft | template pet\n")
    only = [run("AX-b", 0, settings=all_settings(task="RTE"), template={"text": "a"}), *folders[:2]]
    assert [table["settings"] for table in tables(*only)] == [{}]


def test_templates_of_one_name_are_told_by_their_hash(run):
    """config.json holds the template, or the record itself; a run that doesn't tell is like those that agree."""
    folders = [run(seed=seed, settings=all_settings(seed=seed, task=f"{seed}/mine.json")) for seed in range(3)]
    for folder, text in zip(folders, ("a", "a"), strict=False):
        (Path(folder) / "config.json").write_text(json.dumps({"task": {"text": text, "name": "CB"}}))
    assert [(table["settings"], table["tasks"]["CB"]["seeds"]) for table in tables(*folders)] == [({}, [0, 1, 2])]
    other = run(seed=0, folder="other", settings=all_settings(task="mine.json"), template={"name": "CB", "text": "b"})
    first, untold, last = tables(*folders, other)
    assert [table["tasks"]["CB"]["seeds"] for table in (first, untold, last)] == [[0, 1], [2], [0]]
    told = [table["settings"]["template_sha256"] for table in (first, untold, last)]
    assert (told[1], len(set(told)), len(told[0])) == ("not told", 3, 8)


def test_tasks_of_ones_own_are_shown_and_not_counted(run):
    (table,) = tables(run("Mine", 0))
    assert table["overall"] is None
    assert "Mine" in table_text(table)
    assert table_text(table).endswith("no overall score: none of SuperGLUE's eight tasks is here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 0}, r"CB-0 and .*other both hold CB \(small, pgd, soft\) with seed 0; give each seed once\."),
        ({"eval_split": "dev32"}, r"but on splits 'val' and 'dev32'; give runs on the same split\."),
        ({"metrics": {"f1a": 1.0}}, r"but with different metrics; give runs of the same task template\."),
    ],
)
def test_runs_that_cannot_be_averaged(run, change, message):
    with pytest.raises(ValueError, match=message):
        tables(run(seed=0), run(**{"seed": 1, "folder": "other", **change}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("task", ...), ("model", 3), ("perturbation", ...), ("prompt", None), ("eval_split", ...), ("seed", "0"),
     ("seed", True), ("metrics", ...), ("metrics", {}), ("metrics", {"accuracy": "0.5"}),
     ("metrics", {"accuracy": float("nan")})],
)  # fmt: skip
def test_files_that_lack_something(run, name, value):
    with pytest.raises(ValueError, match=rf"result\.json has no valid {name}; give a file that train\.py or evaluate"):
        read_result(run(folder="bad", **{name: value}))


def test_folders_without_a_result(tmp_path):
    message = "nowhere holds no result.json; give the folders of runs that have ended"
    with pytest.raises(ValueError, match=message):
        read_result(str(tmp_path / "nowhere"))
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json: not valid JSON \("):
        read_result(str(tmp_path))


def test_the_folder_of_several_prompts(tmp_path):
    (tmp_path / "population.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds several prompts; give one or more of .*/members/\*\.$"):
        read_result(str(tmp_path))


def test_the_command(run, tmp_path, capsys):
    file = tmp_path / "new" / "overall.json"
    folders = [run("CB", seed) for seed in (0, 1)]
    assert main([*folders, "--json", str(file)]) == 0
    assert "partial mean of 1 of 8 tasks: 0.5000" in capsys.readouterr().out
    assert json.loads(file.read_text()) == tables(*folders)
    for argv, message in (
        ([str(tmp_path / "no")], "holds no result.json; give the folders of runs that have ended."),
        ([folders[0], "--json", str(tmp_path)], "that is a folder or lies below a file; give a file's name."),
        ([], "the following arguments are required"),
    ):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message.lower() in error.lower()


def test_a_run_that_has_gone_on_since_its_result(run, capsys):
    folder = run("CB", 0)
    for step, said in ((3, ""), (9, "result.json is of step 3, and its run has gone on to step 9: let it end, or ")):
        (Path(folder) / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        read_result(folder)
        told = capsys.readouterr().err
        assert said in told
        assert bool(said) == bool(told)


def test_the_script(run):
    command = [sys.executable, str(ROOT / "scripts" / "overall.py"), run("RTE", 0)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("small | pgd | soft\n  RTE  1 seed")
