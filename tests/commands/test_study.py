"""scripts/study.py, landscape.py and robustness.py on a tiny model: what they train, write, draw and refuse."""

import csv
import importlib.util
import json
import shutil
from argparse import Namespace
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ptp_ds.commands.landscape import main as landscape_main
from ptp_ds.commands.robustness import _kinds
from ptp_ds.commands.robustness import main as robustness_main
from ptp_ds.commands.study import main as study_main
from ptp_ds.commands.study import write_report
from ptp_ds.studies.study import read_study
from ptp_ds.tasks import load_task
from tests.support.runs import check
from tests.support.zygote import run_script

STUDY = """
settings: {model: MODEL, prompt_length: 5, batch_size: 4, max_steps: 3, eval_tokens: 600, lr: 1e-2, log_every: 1}
seeds: 0-1
tasks:
  COPA: {task: COPA}
methods:
  plain: {perturbation: none}
  noise: {perturbation: gaussian}
"""


@pytest.fixture(scope="module")
def study(tiny_model, tmp_path_factory):
    """A finished study of two methods and two seeds, and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(STUDY.replace("MODEL", str(tiny_model)))
    first = run_script("study.py", ["study.yaml", "--output_dir", "out", "--methods", "plain"], folder)
    assert "cell 1 of 1: COPA/plain, 2 seeds" in check(first).stdout
    done = run_script("study.py", ["study.yaml", "--output_dir", "out"], folder)
    return folder, check(done).stdout


def member(study, method, seed=0):
    return study[0] / "out" / "cells" / "COPA" / method / "members" / f"seed-{seed}"


def test_cells_are_trained_once_and_their_rows_are_told(study, run_train, tiny_model, tmp_path):
    folder, told = study
    out = folder / "out"
    assert "cell 1 of 1: COPA/noise, 2 seeds" in told, "plain was finished"
    assert "| COPA | noise | 2 |" in told
    assert "| COPA | noise | 2 |" in (out / "report.md").read_text()
    with (out / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("plain", "0"), ("plain", "1"), ("noise", "0"), ("noise", "1"),
    ]  # fmt: skip
    results = [json.loads((member(study, row["method"], row["seed"]) / "result.json").read_text()) for row in rows]
    assert [float(row["score"]) for row in rows] == [result["metrics"]["accuracy"] for result in results]
    nats = [float(row["cross_entropy"]) for row in rows]
    assert nats == [result["eval_cross_entropy"] for result in results]
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    for line, result in zip(lines, results, strict=True):
        assert (line["task"], line["metrics"], line["untrained"]) == ("COPA", result["metrics"], result["untrained"])
        assert (line["majority"], line["failed"], line["settings"]["lr"]) == (result["majority"], None, 0.01)
        assert line["seconds"] == pytest.approx(3 * result["step_seconds_median"])
    assert (out / "COPA.png").stat().st_size > 5000
    assert len(list((out / "tensorboard").rglob("events*"))) >= 4
    args = ["--model", tiny_model, "--task", "COPA", "--prompt_length", "5", "--batch_size", "4", "--max_steps", "3",
            "--eval_tokens", "600", "--lr", "0.01", "--log_every", "1", "--perturbation", "gaussian", "--seed",
            "1"]  # fmt: skip
    check(run_train([*args, "--output_dir", tmp_path / "alone"]))
    ours, theirs = (
        load_file(run / "checkpoints" / "step-000003" / "state.safetensors")["prompt"]
        for run in (member(study, "noise", 1), tmp_path / "alone")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_report_of_what_is_there_and_refusals(study):
    folder, _ = study
    again = check(run_script("study.py", ["study.yaml", "--output_dir", "out", "--report"], folder))
    assert "cell " not in again.stdout
    (folder / "other.yaml").write_text((folder / "study.yaml").read_text().replace("1e-2", "2e-2"))
    wrong = [
        (["other.yaml", "--output_dir", "out"], "was run with lr 0.01, the study says 0.02"),
        (["study.yaml", "--output_dir", "new", "--report"], "No cell of study.yaml is finished in new"),
        (["none.yaml", "--output_dir", "out"], "Study none.yaml"),
        (["study.yaml", "--output_dir", "out", "--tasks", "CB"], "--tasks CB: the study has COPA"),
    ]
    for argv, message in wrong:
        done = run_script("study.py", argv, folder)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr


def test_a_finished_cell_of_other_rows_is_told_before_another_method_trains(study, tmp_path):
    """The report would refuse to compare them, behind the training."""
    shutil.copytree(study[0], tmp_path, dirs_exist_ok=True)
    cells = tmp_path / "out" / "cells" / "COPA"
    shutil.rmtree(cells / "noise")
    record = json.loads((cells / "plain" / "population.json").read_text())
    record["members"][1]["rows"]["eval"] = "other"
    (cells / "plain" / "population.json").write_text(json.dumps(record))
    done = run_script("study.py", ["study.yaml", "--output_dir", "out", "--methods", "noise"], tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "COPA/plain/population.json was run with other eval rows than the files hold now" in done.stderr
    assert not (cells / "noise").exists()


def test_a_cell_that_is_run_again_has_its_new_score_on_tensorboard(study, tmp_path):
    """A cell's folder removed and trained again is another outcome: played here by changing what is on record."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("study.yaml", "out"):
        (shutil.copytree if name == "out" else shutil.copy)(study[0] / name, tmp_path / name)
    file = tmp_path / "out" / "cells" / "COPA" / "plain" / "population.json"
    record = json.loads(file.read_text())
    record["members"][0]["metrics"] = {"accuracy": 0.125}
    record["members"][1] |= {"metrics": None, "failed": "The loss is not finite at step 2"}
    file.write_text(json.dumps(record))
    part = read_study(str(tmp_path / "study.yaml"))
    write_report(part, tmp_path / "out", "study")
    boards = tmp_path / "out" / "tensorboard" / "COPA"
    board = EventAccumulator(str(boards / "plain" / "seed-0")).Reload()
    assert [event.value for event in board.Scalars("hparam/score")] == [0.125]
    assert sorted(str(path.relative_to(boards)) for path in boards.glob("*/*")) == [
        "noise/seed-0", "noise/seed-1", "plain/seed-0",
    ]  # fmt: skip


def test_tensorboard_shows_each_seeds_own_settings(tmp_path):
    """Where they have {draw}; a task keeps the study's name, whatever its template."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (tmp_path / "study.yaml").write_text(
        'seeds: 0-1\ndraws: [13, 21]\ntasks: {R: {task: "t-{draw}.json", train_split: "few-{draw}"}}\n'
        "methods: {plain: {perturbation: none}}\n"
    )
    found = read_study(str(tmp_path / "study.yaml"))
    members = [{"name": name, "settings": asdict(run), "metrics": {"accuracy": 0.5}, "untrained": {"accuracy": 0.5},
                "majority": 0.5, "failed": None, "best_step": 1, "steps": 1}
               for name, run in found.cells[0].runs.items()]  # fmt: skip
    folder = found.cells[0].folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "population.json").write_text(json.dumps({"members": members}))
    write_report(found, tmp_path, "study")
    for seed, draw in ((0, "13"), (1, "21")):
        board = EventAccumulator(str(tmp_path / "tensorboard" / "R" / "plain" / f"seed-{seed}")).Reload()
        content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        shown = HParamsPluginData.FromString(content).session_start_info.hparams
        assert {name: one.string_value or one.number_value for name, one in shown.items()} == {
            "task": "R", "method": "plain", "seed": seed, "train_split": f"few-{draw}",
        }  # fmt: skip


def test_a_landscape_of_two_adapters(study):
    folder, _ = study
    given = ["--adapters", member(study, "plain"), member(study, "noise"), "--output_dir", "landscape", "--grid", "5",
             "--rows", "4", "--radius", "0.5", "--radii", "0.25", "0.5"]  # fmt: skip
    told = check(run_script("landscape.py", given, folder)).stdout
    out = folder / "landscape"
    record = json.loads((out / "landscape.json").read_text())["adapters"]
    for space in ("input", "prompt"):
        with np.load(out / "landscape.npz") as arrays:
            assert arrays[f"{space}_values"].shape == (2, 5, 5)
            names, centres = list(arrays["adapters"]), arrays[f"{space}_values"][:, 2, 2]
        assert names == [str(member(study, "plain")), str(member(study, "noise"))]
        assert [record[name][space]["centre"] for name in names] == pytest.approx(centres.tolist())
        assert (out / f"landscape-{space}.png").stat().st_size > 20000
    both = [[record[name][space]["centre"] for name in names] for space in ("input", "prompt")]
    assert both[0] == pytest.approx(both[1], rel=1e-4), "the centre of both spaces is the prompt as it is"
    assert "curvature" in told
    assert list((out / "tensorboard").iterdir())


def test_robustness_counts_what_evaluations_count(study):
    folder, _ = study
    given = ["--adapters", member(study, "plain"), member(study, "noise", 1), "--output_dir", "robust", "--noise", "0",
             "1", "--masks", "0.2", "--typos", "0", "0.5", "--attack", "0.5", "--draws", "2"]  # fmt: skip
    check(run_script("robustness.py", given, folder))
    lines = json.loads((folder / "robust" / "robustness.json").read_text())["lines"]
    assert len(lines) == 2 * 6
    for adapter, method, seed in (("seed-0", "plain", 0), ("seed-1", "noise", 1)):
        result = json.loads((member(study, method, seed) / "result.json").read_text())
        clean = [x["score"] for x in lines if x["adapter"] == adapter and x["level"] == 0]
        assert clean == [result["metrics"]["accuracy"]] * 2
        (attack,) = [x for x in lines if x["adapter"] == adapter and x["kind"] == "attack"]
        assert attack["score"] == pytest.approx((attack["right"] - attack["fooled"]) / result["eval_examples"])
    assert (folder / "robust" / "robustness.png").stat().st_size > 10000


@pytest.mark.parametrize(("package", "name"), [("scipy", "SciPy"), ("matplotlib", "matplotlib")])
def test_a_missing_plot_extra_is_one_sentence(tmp_path, monkeypatch, capsys, package, name):
    """Before a study file or an adapter, which aren't there, is looked for."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else found(asked))
    monkeypatch.chdir(tmp_path)
    for command, given in ((study_main, "study.yaml"), (landscape_main, "--adapters=one"),
                           (robustness_main, "--adapters=one")):  # fmt: skip
        assert command([given, "--output_dir", "out"]) == 2
        said = f"error: Studies, landscapes and robustness need matplotlib and SciPy, and {name} isn't installed: "
        assert capsys.readouterr() == ("", f"{said}pip install 'ptp_ds[plot]'.\n")


def test_what_the_pictures_scripts_refuse(study, tmp_path):
    folder, plain = study[0], member(study, "plain")
    other = tmp_path / "other"
    shutil.copytree(plain / "adapter", other)
    card = json.loads((other / "ptp_ds.json").read_text())
    card["task"]["text"] = "{premise} {question}"
    (other / "ptp_ds.json").write_text(json.dumps(card))
    spans = tmp_path / "spans"
    shutil.copytree(other, spans)
    (spans / "ptp_ds.json").write_text(json.dumps({**card, "task": load_task("WSC").spec()}))
    assert _kinds(Namespace(adapters=[spans], kinds=["noise", "typos"])) == ["noise"]
    wrong = [
        ("landscape.py", ["--adapters", plain, other], "its task isn't that of"),
        ("landscape.py", ["--adapters", tmp_path / "none"], str(tmp_path / "none")),
        ("landscape.py", ["--adapters", plain, "--grid", "4"], "--grid is 4; expected an odd number"),
        ("landscape.py", ["--adapters", plain, "--radius", "0"], "--radius is 0.0; expected a number above 0"),
        ("landscape.py", ["--adapters", plain, "--radii", "0.5", "2"], "--radii 2: expected numbers above 0 and up to"),
        ("landscape.py", ["--adapters", plain, "--radii", "-1"], "--radii -1: expected numbers above 0"),
        ("robustness.py", ["--adapters", plain, "--masks", "1.5"], "--masks 1.5: expected numbers from 0 to 1"),
        ("robustness.py", ["--adapters", spans, "--kinds", "typos", "--model", "nowhere"],  # before it is looked for
         "--kinds typos: rows of task WSC are more than fields of text"),
        ("robustness.py", ["--adapters", plain, "--rows", "0"], "--rows is 0; expected a whole number"),
    ]  # fmt: skip
    for script, argv, message in wrong:
        done = run_script(script, [*argv, "--output_dir", "wrong"], folder)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
    assert not (folder / "wrong").exists()
