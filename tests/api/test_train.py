"""ptp_ds.train: a run as the command makes it, data in memory, callbacks, and a process left as it was."""

import datetime
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch

import ptp_ds
from ptp_ds.api.data import require_unchanged, rows_by_split, rows_of, task_file, template_of, write_rows
from ptp_ds.api.run import _settings
from ptp_ds.config.presets import PRESETS
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.tasks.data import DEMO_DATA
from ptp_ds.tasks.template import parse_task
from tests.support.paths import ROOT
from tests.support.processes import worker_environment
from tests.support.runs import adapter, check

pytestmark = pytest.mark.usefixtures("no_launcher")

QUICK = {"prompt_length": 4, "batch_size": 4, "max_steps": 2, "eval_tokens": 600, "lr": 0.1, "log_every": 1}
TEMPLATE = {
    "name": "Mood", "text": "{line}\nMood:", "truncate": "line", "label": "mood",
    "verbalizers": {"up": " good", "down": " bad"}, "metrics": ["accuracy"],
}  # fmt: skip
ROWS = [{"line": f"Line {n} is {'fine' if n % 3 else 'poor'}.", "mood": "up" if n % 3 else "down"} for n in range(20)]


def demo(task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO_DATA / task / f"{split}.jsonl").read_text().splitlines()]


def test_a_call_is_the_commands_run_bit_for_bit(run_train, tiny_model, tmp_path):
    told: list[dict] = []
    result = ptp_ds.train(
        task="COPA", model=tiny_model, perturbation="pgd", output_dir=tmp_path / "call", callbacks=[told.append],
        verbose=False, **QUICK,
    )  # fmt: skip
    flags = [word for name, value in QUICK.items() for word in (f"--{name}", value)]
    check(run_train(["--task", "COPA", "--model", tiny_model, "--perturbation", "pgd", *flags,
                     "--output_dir", tmp_path / "command"]))  # fmt: skip
    assert torch.equal(adapter(tmp_path / "call"), adapter(tmp_path / "command"))
    record = json.loads((tmp_path / "command" / "result.json").read_text())
    assert result.metrics == record["metrics"]
    assert result.untrained == record["untrained"]
    assert result.adapter == tmp_path / "call" / "adapter"
    assert told == [json.loads(line) for line in (tmp_path / "call" / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in told] == ["untrained", "train", "train", "select", "eval"]


def test_the_process_is_left_as_it_was(tiny_model, tmp_path):
    """Environment, signals, threads, the package's logger; twice, and the second run is the first again."""
    logger = logging.getLogger("ptp_ds")
    before = (dict(os.environ), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
              torch.get_num_threads(), list(logger.handlers))  # fmt: skip
    found = []
    given = {"task": "COPA", "model": str(tiny_model), "verbose": False, "callbacks": None, **QUICK}
    for number in range(2):
        ptp_ds.train(**given, output_dir=tmp_path / str(number))
        found.append(adapter(tmp_path / str(number)))
        after = (dict(os.environ), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
                 torch.get_num_threads(), list(logger.handlers))  # fmt: skip
        assert after == before
        assert not torch.distributed.is_initialized()
    assert torch.equal(*found)


def test_off_the_main_thread(tiny_model, tmp_path):
    found: list[dict] = []

    def body() -> None:
        given = {**QUICK, "task": "COPA", "model": str(tiny_model), "output_dir": tmp_path / "thread"}
        found.append(ptp_ds.train(**given, verbose=False).metrics)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(120)
    assert set(found[0]) == {"accuracy"}


def test_a_callback_ends_the_run_with_a_prompt(tiny_model, tmp_path):
    steps = []

    def stop(line: dict) -> None:
        steps.append((line["kind"], line["step"]))
        if line["kind"] == "train" and line["step"] == 3:
            raise ptp_ds.StopRun

    given = {**QUICK, "max_steps": 50, "task": "COPA", "model": str(tiny_model), "verbose": False}
    result = ptp_ds.train(**given, callbacks=[stop], output_dir=tmp_path / "run")
    assert result.record["steps"] == 3
    assert steps[-2:] == [("select", 3), ("eval", 3)]
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    assert (result.adapter / "adapter_config.json").is_file()


@pytest.mark.parametrize(("kind", "seeds"), [("train", None), ("select", "0 1"), ("untrained", None), ("eval", "0 1")])
def test_a_callbacks_own_error_passes(tiny_model, tmp_path, kind, seeds):
    """With its traceback, although it is one that a disk may raise, too; what was saved goes on."""

    def look_up(line: dict) -> None:
        if line["kind"] == kind:
            (tmp_path / "table.csv").read_text()

    given = {**QUICK, "task": "COPA", "model": str(tiny_model), "verbose": False, "seeds": seeds}
    with pytest.raises(FileNotFoundError, match=r"table\.csv") as told:
        ptp_ds.train(**given, callbacks=[look_up], output_dir=tmp_path / "run")
    assert "look_up" in [entry.name for entry in told.traceback]
    (tmp_path / "table.csv").write_text("")
    ptp_ds.train(**given, callbacks=[look_up], output_dir=tmp_path / "run", resume="auto")


def test_several_seeds_and_one_that_a_callback_ends(tiny_model, tmp_path):
    def stop(line: dict) -> None:
        if line["member"] == "seed-1" and line["kind"] == "train":
            raise ptp_ds.StopRun

    given = {**QUICK, "max_steps": 3, "task": "COPA", "model": str(tiny_model), "verbose": False}
    result = ptp_ds.train(**given, seeds=range(2), callbacks=[stop], output_dir=tmp_path / "run")
    assert {name: one.record["steps"] for name, one in result.members.items()} == {"seed-0": 3, "seed-1": 1}
    mean = sum(one.metrics["accuracy"] for one in result.members.values()) / 2
    assert result.metrics == {"accuracy": pytest.approx(mean)}
    with pytest.raises(UserError, match=r"take one of \.members, such as \.members\['seed-0'\]\.adapter"):
        _ = result.adapter


def test_rows_and_a_template_in_memory(tiny_model, tmp_path, monkeypatch):
    """Beside the run as files: it is resumed, and its adapter scored, like any other."""
    from ptp_ds.commands.evaluate import main as evaluate

    given = {**QUICK, "model": str(tiny_model), "task": TEMPLATE, "data": ROWS, "verbose": False}
    result = ptp_ds.train(**given, output_dir=tmp_path / "run")
    files = {file.stem: file.read_text().splitlines() for file in (tmp_path / "run/data/Mood").iterdir()}
    assert {name: len(lines) for name, lines in files.items()} == {"train": 16, "val": 4}
    rows = [json.dumps(row) for row in ROWS]
    assert sorted(files["train"] + files["val"]) == sorted(rows)
    assert evaluate(["--adapter", str(tmp_path / "run"), "--json", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["metrics"] == result.metrics
    longer = ptp_ds.train(**{**given, "max_steps": 3}, resume="auto", output_dir=tmp_path / "run")
    assert longer.record["steps"] == 3


@pytest.mark.parametrize("seeds", [None, "0"])
def test_a_runs_rows_are_not_written_over(tiny_model, tmp_path, seeds):
    """Other rows, another draw of the same, another template: refused before anything is written; the same go on."""
    out = tmp_path / "run"
    given = {**QUICK, "max_steps": 1, "model": str(tiny_model), "task": TEMPLATE, "data": ROWS, "verbose": False}
    given |= {"output_dir": out, "seeds": seeds}
    ptp_ds.train(**given)
    files = [out / "task.json", *sorted((out / "data" / "Mood").iterdir())]
    before = {file: file.read_bytes() for file in files}
    others = [
        ({"data": ROWS[1:]}, r"data/Mood/train\.jsonl holds other rows than data: give what the run there began"),
        ({"seed": 1}, "holds other rows than data: .* began with, its seed too, or another output_dir"),
        ({"task": {**TEMPLATE, "text": "{line} Mood:"}}, r"task\.json is another template than task: give what"),
    ]
    for other, said in others:
        with pytest.raises(UserError, match=said):
            ptp_ds.train(**{**given, **other}, resume="auto")
        with pytest.raises(UserError, match="holds another run; continue it with --resume auto"):
            ptp_ds.train(**{**given, **other})
        assert {file: file.read_bytes() for file in files} == before
    with pytest.raises(UserError, match="holds another run; continue it with --resume auto"):
        ptp_ds.train(**given)
    reordered = [dict(reversed(row.items())) for row in ROWS]
    ptp_ds.train(**{**given, "data": reordered, "max_steps": 2}, resume="auto")


def test_what_failed_before_its_first_checkpoint_is_written_over(tmp_path):
    task = parse_task(TEMPLATE, "test")
    write_rows({"train": ROWS}, task, tmp_path)
    require_unchanged(TEMPLATE, task, {"train": ROWS[1:]}, tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(UserError, match="holds other rows"):
        require_unchanged(TEMPLATE, task, {"train": ROWS[1:]}, tmp_path)


def test_labels_in_another_order_are_not_the_runs(tmp_path):
    """Those of a set have another order in each process, and a classifier's outputs follow it."""
    task_file(TEMPLATE, tmp_path)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    require_unchanged(dict(TEMPLATE), parse_task(dict(TEMPLATE), "test"), {}, tmp_path)
    other = {**TEMPLATE, "verbalizers": dict(reversed(TEMPLATE["verbalizers"].items()))}
    with pytest.raises(UserError, match=r"json has the labels in the order up, down, task as down, up: give what"):
        require_unchanged(other, parse_task(other, "test"), {}, tmp_path)


def test_data_of_every_kind_gives_the_same_rows(tmp_path):
    import datasets

    task = parse_task(TEMPLATE, "test")
    labels = datasets.ClassLabel(names=["up", "down"])
    numbered = [{**row, "mood": labels.str2int(row["mood"])} for row in ROWS]
    features = datasets.Features({"line": datasets.Value("string"), "mood": labels})
    (tmp_path / "rows.csv").write_text("line,mood\n" + "".join(f'"{r["line"]}",{r["mood"]}\n' for r in ROWS))
    kinds = {
        "list": ROWS, "csv": tmp_path / "rows.csv", "dataset": datasets.Dataset.from_list(numbered, features=features),
    }  # fmt: skip
    found = {name: rows_by_split(data, task, ("train", "val"), 3) for name, data in kinds.items()}
    assert found["list"] == found["csv"] == found["dataset"]
    assert sorted(map(str, found["list"]["train"] + found["list"]["val"])) == sorted(map(str, ROWS))
    by_split = datasets.DatasetDict({"train": kinds["dataset"], "val": kinds["dataset"]})
    assert rows_by_split(by_split, task, ("train", "val"), 3) == {"train": ROWS, "val": ROWS}
    write_rows({"val": ROWS}, task, tmp_path / "out")
    assert (tmp_path / "out/data/Mood/val.jsonl").read_text().splitlines() == [json.dumps(row) for row in ROWS]
    assert parse_task(template_of(task), "again") == task
    assert parse_task(template_of(ptp_ds.load_task("ReCoRD")), "again") == ptp_ds.load_task("ReCoRD")


STARS = {**TEMPLATE, "name": "Stars", "label": "stars", "verbalizers": {str(n): f" {n}" for n in range(1, 6)}}


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        ("12345", "12345", "12345"),  # a name may be another class's number: names are looked for first
        ("12345", "01234", "01234"),
        (["one", "two"], "01", "01"),
        (["True", "False"], ["false", "true"], ["true", "false"]),
        (["up", "down", "none"], ["up", "down"], ["up", "down", "none"]),  # an error where a row is of that class
    ],
)
def test_the_classes_of_a_table_are_the_templates_labels(names, labels, expected):
    """All by their names, or all by their numbers, in a DatasetDict and in numpy's form, too."""
    import datasets

    task = parse_task({**STARS, "verbalizers": {label: f" {label}" for label in labels}}, "test")
    features = datasets.Features({"line": datasets.Value("string"), "stars": datasets.ClassLabel(names=list(names))})
    rows = [{"line": name, "stars": number} for number, name in enumerate(names)] + [{"line": "?", "stars": -1}]
    table = datasets.Dataset.from_list(rows, features=features)
    for data in (table, table.with_format("numpy")):
        found = rows_by_split(datasets.DatasetDict({"train": data, "val": data}), task, ("train", "val"), 0)
        wanted = [{"line": n, "stars": label} for n, label in zip(names, expected, strict=True)]
        assert found == {split: [*wanted, {"line": "?", "stars": -1}] for split in ("train", "val")}


@pytest.mark.parametrize("names", [["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], ["0", "1", "2", "3", "4"]])
def test_classes_that_might_be_either_are_refused(names):
    import datasets

    features = datasets.Features({"line": datasets.Value("string"), "stars": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_list([{"line": "x", "stars": n} for n in range(5)], features=features)
    with pytest.raises(UserError, match=r"data: the classes of 'stars' are .*, the labels of task Stars 1, 2, 3, 4, 5"):
        rows_by_split(table, parse_task(STARS, "test"), ("train", "val"), 0)


def test_rows_of_other_types_than_jsons(tmp_path):
    """Arrays' numbers are numbers; a date that the template doesn't read is left out, one that it reads is refused."""
    task = parse_task({**STARS, "values": {}}, "test")
    day = datetime.date(2026, 11, 30)
    rows = [{"line": "x", "stars": np.int64(3), "size": np.float32(0.5), "tags": np.array(["a"]), "day": day}] * 3
    found = rows_by_split({"train": rows, "val": rows}, task, ("train", "val"), 0)
    write_rows(found, task, tmp_path)
    lines = (tmp_path / "data/Stars/val.jsonl").read_text().splitlines()
    assert lines == ['{"line": "x", "stars": 3, "size": 0.5, "tags": ["a"]}'] * 3
    for name in ("line", "stars"):
        with pytest.raises(UserError, match=rf"data\['train'\]: row 0: field '{name}' is datetime.*, of type date"):
            rows_by_split({"train": [{**rows[0], name: day}], "val": rows}, task, ("train", "val"), 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sigmaa": 1}, r"train\(\) has no setting 'sigmaa' \(did you mean 'sigma'\?\)"),
        ({"lr": "fast"}, r"train\(\): 'lr' must be float, not 'fast'"),
        ({"data": 7, "task": "COPA"}, r"data is 7; expected a folder, a file in .*, a list of dicts"),
        ({"data": ["x"], "task": "COPA"}, "row 0 is 'x'; expected a dict"),
        ({"data": ROWS[:2], "task": TEMPLATE}, "data has 2 rows; give three or more"),
        ({"data": {"train": ROWS}, "task": TEMPLATE}, "data has the splits train; expected 'val', too"),
        ({"data": ROWS, "data_dir": "x"}, "takes data, data_dir or dataset, one of them"),
        ({"data": "rows.txt"}, r"data is 'rows\.txt'; expected a folder, a file in \.jsonl"),
        ({"task": {"name": "X"}}, "task: the template lacks"),
        ({"task": 3}, "task is 3; expected a task's name"),
        ({"callbacks": len}, "callbacks is <built-in function len>; expected a list of functions"),
        ({"callbacks": [len, 3]}, r"callbacks is \[<built-in function len>, 3\]; expected a list of functions"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path, given, said):
    with pytest.raises(UserError, match=said):
        ptp_ds.train(**given, output_dir=tmp_path / "run", verbose=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "given", "wanted"),
    [
        (RunConfig(max_steps=20), {"preset": "ptp-adv"}, {}),
        (RunConfig(max_steps=20, preset="ptp-adv"), {}, {}),
        (RunConfig(max_steps=20, preset="ptp-adv", epsilon=0.3), {}, {"epsilon": 0.3}),
        (RunConfig(max_steps=20, preset="ptp-rn", epsilon=0.3), {"preset": "ptp-adv", "alpha": 0.5, "epsilon": 0.1},
         {"alpha": 0.5}),
    ],
)  # fmt: skip
def test_a_preset_sets_what_a_config_left_as_it_was(config, given, wanted):
    """As on a command line: the preset's settings, before them what the config changed, before that the keywords."""
    run, explicit = _settings(config, None, given)
    expected = {**asdict(RunConfig()), "max_steps": 20, "preset": "ptp-adv", **PRESETS["ptp-adv"], **wanted}
    assert asdict(run) == expected
    changed = {name for name, value in asdict(config).items() if value != getattr(RunConfig(), name)}
    assert explicit == changed | set(given)


def test_rows_to_answer():
    task = ptp_ds.load_task("Reviews")
    assert rows_of("Fine.", task) == rows_of({"review": "Fine."}, task) == rows_of(["Fine."], task)
    texts = ["Fine.", "Poor."]
    for several in (np.array(texts), np.array(texts, dtype=object), pandas.Series(texts), datasets_column(texts)):
        assert rows_of(several, task) == rows_of(texts, task)
    assert rows_of(np.array("Fine."), task) == rows_of(np.str_("Fine."), task) == rows_of("Fine.", task)
    frame = pandas.DataFrame({"review": texts, "label": ["positive", None], "n": [1.5, float("nan")]})
    assert rows_of(frame, task)[0] == {"review": "Fine.", "label": "positive", "n": 1.5}
    assert "n" not in rows_of(frame, task)[1]
    with pytest.raises(UserError, match="row 0 is 1; expected a dict"):
        rows_of(np.array([1, 2]), task)
    with pytest.raises(UserError, match="has the fields premise, "):
        rows_of("Fine.", ptp_ds.load_task("COPA"))


def test_a_file_of_rows_to_answer_is_a_path_and_its_name_no_text(tmp_path, monkeypatch):
    task, row = ptp_ds.load_task("Reviews"), {"review": "Fine."}
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("review\nFine.\n")
    assert rows_of(Path("rows.csv"), task) == [row]
    for given, other in (("rows.csv", task), (["Fine.", "rows.csv"], task), ("rows.csv", ptp_ds.load_task("COPA"))):
        with pytest.raises(UserError, match=r"'rows\.csv' is a file, and a text is a row: give pathlib\.Path\('rows"):
            rows_of(given, other)
    assert rows_of({"review": "rows.csv"}, task) == [{"review": "rows.csv"}]
    assert rows_of("none.csv", task) == [{"review": "none.csv"}]
    with pytest.raises(UserError, match=r"rows is 7; expected a dict, texts, .*, a pathlib\.Path of a file"):
        rows_of(7, task)


def datasets_column(texts: list[str]):
    return datasets.Dataset.from_dict({"review": texts})["review"]


@pytest.mark.parametrize("labels", ["text", "numbers", "categories"])
def test_a_frame_is_its_rows(labels):
    """Numbers are numpy's, and are stored as numbers; a cell without a value is a field that the row lacks."""
    words = {"text": ["up", "down"], "numbers": [1, 0], "categories": ["up", "down"]}[labels] * 5
    task = parse_task(
        {**TEMPLATE, "verbalizers": {"1": " good", "0": " bad"}} if labels == "numbers" else TEMPLATE, "t"
    )
    rows = [{"line": f"Line {n}.", "mood": word, "note": 0.5} for n, word in enumerate(words)]
    frame = pandas.DataFrame(rows)
    if labels == "categories":
        frame["mood"] = frame["mood"].astype("category")
    assert rows_by_split(frame, task, ("train", "val"), 3) == rows_by_split(rows, task, ("train", "val"), 3)
    frame.loc[2, "line"] = None
    frame["line"] = frame["line"].astype(object).where(frame["line"].notna(), float("nan"))
    found = rows_by_split({"train": frame, "val": frame}, task, ("train", "val"), 3)
    assert found["val"] == [row if n != 2 else {"mood": row["mood"], "note": 0.5} for n, row in enumerate(rows)]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_program_goes_on(tiny_model, tmp_path):
    """As a notebook's kernel gets it: SIGINT in the main thread while the call runs."""
    given = {**QUICK, "max_steps": 4000, "task": "COPA", "model": str(tiny_model), "output_dir": str(tmp_path / "run")}
    code = f"""
import os, signal, threading, time, ptp_ds
def press(line):
    if line["step"] == 5:
        os.kill(os.getpid(), signal.SIGINT)
try:
    ptp_ds.train(**{given!r}, callbacks=[press])
except KeyboardInterrupt as stop:
    print("STOPPED", stop)
try:
    os.kill(os.getpid(), signal.SIGINT); time.sleep(5)
except KeyboardInterrupt:
    print("STILL MINE")
"""
    done = subprocess.run([sys.executable, "-c", code], env=worker_environment(), cwd=ROOT, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "STOPPED stopped by signal 2; saved" in done.stdout
    assert "STILL MINE" in done.stdout
    assert list((tmp_path / "run" / "checkpoints").iterdir())
