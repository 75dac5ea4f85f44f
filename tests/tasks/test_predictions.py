"""SuperGLUE's prediction files: their form for all ten tasks, splits without labels, both scripts."""

import copy
import errno
import json
import os
import subprocess

import pytest

from ptp_ds.commands.exits import run_command
from ptp_ds.files import require_writable, write_json, write_jsonl
from ptp_ds.tasks import NoLabelError, load_task
from ptp_ds.tasks.data import Split, is_labelled, load_split, tokenise
from ptp_ds.tasks.predictions import check_numbers, prediction_lines
from ptp_ds.tasks.template import parse_task
from tests.support.task_rows import ROWS
from tests.support.zygote import run_script

SUPERGLUE = ["AX-b", "AX-g", "BoolQ", "CB", "COPA", "MultiRC", "RTE", "ReCoRD", "WSC", "WiC"]


def unlabelled(row: dict) -> dict:
    """The row as the official test files hold it."""
    row = copy.deepcopy(row)
    row.pop("label", None)
    for question in row.get("passage", {}).get("questions", []) if isinstance(row.get("passage"), dict) else []:
        for answer in question["answers"]:
            del answer["label"]
    for query in row.get("qas", []):
        del query["answers"]
    return row


def numbered(name: str) -> dict:
    """The row of test_tasks with the official files' numbers: row 4, questions from 10, answers and queries from 20."""
    row = {**copy.deepcopy(ROWS[name]), "idx": 4}
    if name == "MultiRC":
        for place, question in enumerate(row["passage"]["questions"]):
            question["idx"] = 10 + place
        answers = [answer for question in row["passage"]["questions"] for answer in question["answers"]]
        for place, answer in enumerate(answers):
            answer["idx"] = 20 + place
    for place, query in enumerate(row.get("qas", [])):
        query["idx"] = 20 + place
    return row


def split_of(*rows: dict) -> Split:
    return Split(rows, [f"row {number}" for number in range(len(rows))], "")


EXPECTED = {
    "AX-b": ([0], [{"idx": 4, "label": "not_entailment"}]),
    "AX-g": ([0], [{"idx": 4, "label": "entailment"}]),
    "BoolQ": ([1], [{"idx": 4, "label": "false"}]),
    "CB": ([2], [{"idx": 4, "label": "neutral"}]),
    "COPA": ([1], [{"idx": 4, "label": 1}]),
    "MultiRC": ([1, 0, 1], [{"idx": 4, "passage": {"questions": [
        {"idx": 10, "answers": [{"idx": 20, "label": 1}, {"idx": 21, "label": 0}]},
        {"idx": 11, "answers": [{"idx": 22, "label": 1}]}]}}]),
    "RTE": ([1], [{"idx": 4, "label": "not_entailment"}]),
    "ReCoRD": ([2, 0], [{"idx": 20, "label": "Rome"}, {"idx": 21, "label": "Ann"}]),
    "WSC": ([0], [{"idx": 4, "label": "True"}]),
    "WiC": ([0], [{"idx": 4, "label": "true"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", SUPERGLUE)
def test_lines_of_every_task(name):
    chosen, lines = EXPECTED[name]
    assert prediction_lines(load_task(name), split_of(unlabelled(numbered(name))), chosen) == lines


def test_another_span_makes_wscs_answer_false():
    assert prediction_lines(load_task("WSC"), split_of(numbered("WSC")), [2])[0]["label"] == "False"


def test_lines_keep_the_rows_order():
    rows = [{**ROWS["CB"], "idx": number} for number in ("7", 3)]
    lines = prediction_lines(load_task("CB"), split_of(*rows), [0, 1])
    assert lines == [{"idx": 7, "label": "entailment"}, {"idx": 3, "label": "contradiction"}]


@pytest.mark.parametrize("name", SUPERGLUE)
def test_rows_without_labels_are_predicted_but_not_judged(name, tokenizer):
    task, bare = load_task(name), split_of(unlabelled(ROWS[name]))
    assert is_labelled(task, split_of(ROWS[name]))
    assert not is_labelled(task, bare)
    with pytest.raises(NoLabelError, match=r"row 0: the row has no ('label', the label of task|.*official)"):
        tokenise(task, bare, tokenizer, 400)
    found = tokenise(task, bare, tokenizer, 400, labelled=False).examples
    wanted = tokenise(task, split_of(ROWS[name]), tokenizer, 400).examples
    assert [(e.context_ids, e.candidate_ids, e.names) for e in found] == [
        (e.context_ids, e.candidate_ids, e.names) for e in wanted
    ]
    assert not any(example.trainable for example in found)
    assert tokenise(task, split_of(ROWS[name]), tokenizer, 400, labelled=False).examples == found


@pytest.mark.parametrize("name", ["BoolQ", "CB", "COPA", "RTE", "WSC", "WiC"])
@pytest.mark.parametrize("value", [-1, None])
def test_the_hubs_missing_labels(name, value):
    assert not is_labelled(load_task(name), split_of({**ROWS[name], "label": value}))


def test_some_labels_are_not_enough(tokenizer):
    task, split = load_task("CB"), split_of(unlabelled(ROWS["CB"]), ROWS["CB"])
    assert is_labelled(task, split)
    with pytest.raises(ValueError, match="row 0: the row has no 'label', the label of task"):
        tokenise(task, split, tokenizer, 400)


def test_a_wrong_label_is_not_a_missing_one():
    for name, message in (("CB", "label 'maybe' is not one of"), ("WSC", "has label 'maybe'; expected true or false")):
        with pytest.raises(ValueError, match=message):
            is_labelled(load_task(name), split_of({**ROWS[name], "label": "maybe"}))


@pytest.mark.parametrize(
    ("name", "lost", "what"),
    [("WSC", ("idx",), "row"), ("MultiRC", ("passage", "questions", 1, "answers", 0, "idx"), "answer"),
     ("MultiRC", ("passage", "questions", 0, "idx"), "question"), ("ReCoRD", ("qas", 1, "idx"), "query")],
)  # fmt: skip
def test_rows_without_numbers(name, lost, what):
    row = numbered(name)
    part = row
    for step in lost[:-1]:
        part = part[step]
    del part[lost[-1]]
    examples = len(load_task(name).entries(row, "", labelled=False))
    with pytest.raises(ValueError, match=f"row 0: the {what} has no idx; a prediction file needs the official files'"):
        check_numbers(load_task(name), split_of(row), examples)


def test_rows_of_ones_own_are_counted():
    spec = {
        "name": "T",
        "text": "{a}:",
        "label": "y",
        "verbalizers": {"x": " no", "y": " yes"},
        "metrics": ["accuracy"],
    }
    task = parse_task(spec, "t")
    assert prediction_lines(task, split_of({"a": "b"}, {"a": "c"}), [0, 1])[1] == {"idx": 1, "label": "y"}
    with pytest.raises(ValueError, match="row 0: the row has no idx; a prediction file needs"):
        prediction_lines(task, split_of({"a": "b", "idx": None}), [0])


def official(name: str, row: dict) -> dict | None:
    """The line that would be right, from a labelled row; WSC and BoolQ spell their truth differently."""
    if name == "MultiRC":
        questions = [
            {"idx": q["idx"], "answers": [{"idx": a["idx"], "label": a["label"]} for a in q["answers"]]}
            for q in row["passage"]["questions"]
        ]
        return {"idx": row["idx"], "passage": {"questions": questions}}
    label = row["label"]
    if isinstance(label, bool):
        label = str(label) if name == "WSC" else str(label).lower()
    return {"idx": int(row["idx"]), "label": label}


@pytest.mark.parametrize("name", [name for name in SUPERGLUE if name != "ReCoRD"])
def test_gold_answers_give_the_real_files_labels_back(name, superglue):
    task = load_task(name)
    split = load_split(task, name if name.startswith("AX") else "val", str(superglue), None)
    rows, where = list(split.rows[:200]), list(split.where[:200])
    entries = [entry for row, place in zip(rows, where, strict=True) for entry in task.entries(row, place)]
    chosen = [0 if entry.golds else 1 for entry in entries] if name == "WSC" else [entry.gold for entry in entries]
    bare = Split([unlabelled(row) for row in rows], where, "")
    assert not is_labelled(task, bare)
    assert prediction_lines(task, bare, chosen) == [official(name, row) for row in rows]


def test_gold_entities_of_the_real_record_rows(superglue):
    task = load_task("ReCoRD")
    split = load_split(task, "dev32", str(superglue.parent / "fewglue"), None)
    entries = [entry for row, where in zip(split.rows, split.where, strict=True) for entry in task.entries(row, where)]
    bare = Split([unlabelled(row) for row in split.rows], split.where, "")
    lines = prediction_lines(task, bare, [entry.gold for entry in entries])
    queries = [query for row in split.rows for query in row["qas"]]
    for line, query, entry in zip(lines, queries, entries, strict=True):
        assert line["idx"] == query["idx"]
        assert not entry.golds or line["label"] in {answer["text"] for answer in query["answers"]}


def test_devices_pipes_and_loops_are_no_output(tmp_path):
    """Renaming would put a file in their place, also where a link leads to them."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    for bad in ("/dev/null", tmp_path / "pipe", tmp_path / "loop", tmp_path / "null"):
        with pytest.raises(ValueError, match=r"--out .*: that is a device, a pipe or a loop of links, not a file that"):
            require_writable("--out", str(bad))
    reader, writer = os.pipe()
    with pytest.raises(ValueError, match=r"--out /dev/fd/\d+: that is a device, a pipe or a loop"):
        require_writable("--out", f"/dev/fd/{writer}")
    for end in (reader, writer):
        os.close(end)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(tmp_path, there):
    target = tmp_path / "disk" / "there.jsonl"
    if there:
        target.parent.mkdir()
        target.write_text("before")
    (tmp_path / "a.jsonl").symlink_to("disk/there.jsonl")
    write_jsonl(require_writable("--out", str(tmp_path / "a.jsonl")), [{"idx": 0}])
    assert (tmp_path / "a.jsonl").is_symlink()
    assert target.read_text() == '{"idx": 0}\n'
    write_json(tmp_path / "a.jsonl", {"a": 1})
    assert (tmp_path / "a.jsonl").is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
    assert [file.name for file in target.parent.iterdir()] == ["there.jsonl"]


def test_a_folder_that_may_not_be_written_is_refused_beforehand(tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is given; of the nearest folder that is there, behind links."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "link.jsonl").symlink_to("kept/there.jsonl")
    monkeypatch.setattr("ptp_ds.files.os.access", lambda folder, _: folder != tmp_path / "kept")
    for bad in ("kept/a.jsonl", "kept/new/a.jsonl", "link.jsonl"):
        with pytest.raises(ValueError, match=r"--out .*: this user can't write in .*kept; give a file in another"):
            require_writable("--out", str(tmp_path / bad))
    require_writable("--out", str(tmp_path / "a.jsonl"))


def test_a_write_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "a.jsonl"
    file.write_text("before")
    monkeypatch.setattr("ptp_ds.files._sync", full)
    for write, value in ((write_jsonl, [{"idx": 0}]), (write_json, {})):
        assert run_command(lambda write=write, value=value: write(file, value)) == 2
        assert capsys.readouterr().err == (
            f"error: {file} can't be written (No space left on device); make room there, make its folder writable, or "
            "give another file.\n"
        )
        with pytest.raises(OSError, match="can't be written") as caught:
            write(file, value)
        assert caught.value.errno == errno.ENOSPC
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.jsonl", "before")]
    monkeypatch.undo()
    assert run_command(lambda: write_json(file / "below" / "b.json", {})) == 2
    assert "can't be written (Not a directory); make room" in capsys.readouterr().err


def test_files_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "file" / "below.jsonl"):
        with pytest.raises(ValueError, match=r"--out .*: that is a folder or lies below a file; give a file's name"):
            require_writable("--out", str(bad))
    write_jsonl(require_writable("--out", str(tmp_path / "new" / "a.jsonl")), [{"idx": 0}, {"idx": 1}])
    assert (tmp_path / "new" / "a.jsonl").read_text() == '{"idx": 0}\n{"idx": 1}\n'


def evaluate(*args) -> subprocess.CompletedProcess:
    return run_script("evaluate.py", args)


def test_train_and_evaluate_write_the_same_file(run_train, tiny_model, tmp_path, write_rows):
    """A test split without labels beside labelled ones; the labelled one gives metrics and predictions at once."""
    task, data = load_task("COPA"), tmp_path / "data"
    val = load_split(task, "val", None, None).rows
    for split, rows in (("train", load_split(task, "train", None, None).rows), ("val", val), ("test", val)):
        write_rows(data / "COPA" / f"{split}.jsonl", [unlabelled(row) if split == "test" else row for row in rows])
    out = tmp_path / "run"
    done = run_train(["--task", "COPA", "--model", tiny_model, "--data_dir", data, "--prompt_length", "4",
                      "--max_steps", "2", "--predict_split", "test", "--output_dir", out])  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (out / "predictions" / "COPA.jsonl").read_text()
    predicted = [json.loads(line) for line in lines.splitlines()]
    assert [line["idx"] for line in predicted] == [row["idx"] for row in val]
    right = sum(line["label"] == row["label"] for line, row in zip(predicted, val, strict=True)) / len(val)
    result = json.loads((out / "result.json").read_text())
    assert result["metrics"]["accuracy"] == pytest.approx(right)
    args = ["--adapter", out / "adapter", "--model", tiny_model, "--data_dir", data]
    for split, told in (("test", "no labels, so no metrics"), ("val", f"accuracy {right:.4f}")):
        done = evaluate(*args, "--split", split, "--predictions", tmp_path / split, "--json", tmp_path / "new" / split)
        assert done.returncode == 0, done.stderr[-2000:]
        assert told in done.stdout
        assert (tmp_path / split).read_text() == lines
        report = json.loads((tmp_path / "new" / split).read_text())
        assert ("metrics" in report) == (split == "val")
        assert {name: report[name] for name in ("task", "model", "prompt", "seed", "perturbation")} == {
            name: result[name] for name in ("task", "model", "prompt", "seed", "perturbation")
        }
    done = evaluate(*args, "--split", "test")
    assert done.returncode == 2
    assert "test.jsonl:1: the row has no 'label', the label of task" in done.stderr
