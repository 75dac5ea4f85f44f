"""Rows and templates that a program holds in memory, as the files that a run reads: beside the run, so that it can be
resumed and its adapter evaluated like any other.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, listed, plain_name, write_json, write_jsonl
from ptp_ds.ranks.log import get_logger
from ptp_ds.ranks.once import first_of_host
from ptp_ds.tasks import Task, load_task
from ptp_ds.tasks.data import with_class_labels
from ptp_ds.tasks.hub_rows import official_rows
from ptp_ds.tasks.readers import OWN_ANSWERS
from ptp_ds.tasks.rows import ENDINGS, rows_of_file
from ptp_ds.tasks.template import parse_task
from ptp_ds.training.continuation import holds_run

log = get_logger(__name__)
_REPORTED = 0.2  # share of the rows of a single list that is reported
_TASK = "task.json"
Rows = list[dict[str, Any]]
_FILE = f"a file in {', '.join(ENDINGS)}"
_DATA = f"a folder, {_FILE}, a list of dicts, a datasets.Dataset, a pandas.DataFrame, or a dict of these by split"
_ROWS = f"a dict, texts, a list of dicts, a pathlib.Path of {_FILE}, a datasets.Dataset or a pandas.DataFrame"


def read_task(task: Any) -> Task:
    """A task by its name or its template's path, a template as a dict, or a Task. Raises UserError."""
    if isinstance(task, Task):
        return task
    if isinstance(task, str | Path):
        return load_task(str(task))
    if not isinstance(task, Mapping):
        raise UserError(f"task is {brief(task)}; expected a task's name, the path of a template, or a template.")
    return parse_task(dict(task), "task")


def require_unchanged(task: Any, named: Task, by_split: Mapping[str, Rows], folder: Path) -> None:
    """UserError where a run in `folder` has another template or other rows, which these would be written over.

    task: as it was given, named: what it is. What ended before its first checkpoint holds nothing that could be lost.
    """
    if not holds_run(folder):
        return
    advice = "give what the run there began with, its seed too, or another output_dir."
    file = folder / _TASK
    if not isinstance(task, str | Path | None) and is_file(file) and not (held := load_task(str(file))).is_same(named):
        why = "is another template than task"
        if held.spec() == named.spec():
            why = f"has the labels in the order {listed(held.labels)}, task as {listed(named.labels)}"
        raise UserError(f"{file} {why}: {advice}")
    for name, rows in by_split.items():
        file = _split_file(folder, named, name)
        if is_file(file) and _canonical(rows_of_file(file)[0]) != _canonical(rows):
            raise UserError(f"{file} holds other rows than data: {advice}")


def _canonical(rows: Rows) -> list[str]:
    return [json.dumps(row, sort_keys=True) for row in rows]


def _split_file(folder: Path, task: Task, split: str) -> Path:
    return folder / "data" / task.name / f"{split}.jsonl"


def task_file(task: Any, folder: Path) -> str:
    """What --task names: a name or path as it is; a template as a dict, or a Task, as a file in the run's `folder`."""
    if isinstance(task, str | Path):
        return str(task)
    file = folder / _TASK
    with first_of_host(str(file.absolute())) as first:
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, template_of(task) if isinstance(task, Task) else dict(task))
    return str(file)


def template_of(task: Task) -> dict[str, Any]:
    """The template file's keys of a Task."""
    found: dict[str, Any] = {name: value for name, value in task.spec().items() if value and name != "answers"}
    if task.reader not in OWN_ANSWERS:
        found["candidates"] = dict(task.answers)
    return found


def rows_by_split(data: Any, task: Task, splits: tuple[str, str], seed: int) -> dict[str, Rows]:
    """The rows of each split. A fifth of a single list, drawn by `seed`, is reported. Raises UserError.

    data: a file of rows; a list of dicts, a datasets.Dataset or a pandas.DataFrame; or any of these by split. splits:
    the ones that train and that are reported.
    """
    train, reported = splits
    if isinstance(data, Mapping):  # a DatasetDict, too
        found = {
            plain_name(name, "data: a split"): _rows_of_split(one, task, f"data[{name!r}]")
            for name, one in data.items()
        }
        if missing := [name for name in splits if name not in found]:
            raise UserError(f"data has the splits {', '.join(found) or 'of none'}; expected {missing[0]!r}, too.")
        return found
    whole = _rows_of_split(data, task, "data")
    if len(whole) < 3:
        raise UserError(f"data has {len(whole)} rows; give three or more, or a dict of {train!r} and {reported!r}.")
    held = set(random.Random(seed).sample(range(len(whole)), max(1, round(_REPORTED * len(whole)))))
    log.info("data: %d rows train, %d of split %r are reported", len(whole) - len(held), len(held), reported)
    return {
        train: [row for number, row in enumerate(whole) if number not in held],
        reported: [row for number, row in enumerate(whole) if number in held],
    }


def write_rows(by_split: Mapping[str, Rows], task: Task, folder: Path) -> str:
    """The rows as data/<Task>/<split>.jsonl in the run's `folder`, by one process of a host; what --data_dir names."""
    with first_of_host(str((folder / "data").absolute())) as first:
        if first:
            for name, rows in by_split.items():
                write_jsonl(_split_file(folder, task, name), rows)
    return str(folder / "data")


def _rows(data: Any, where: str, expected: str = _DATA) -> Rows:
    """A split's rows as dicts. expected: what a message says that may be given."""
    if isinstance(data, str | Path):
        path = Path(data)
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{where} is {brief(str(data))}; expected {expected}.")
        return rows_of_file(path)[0]
    if hasattr(data, "iterrows"):
        data = _of_frame(data)
    try:
        each = iter(data)
    except TypeError:
        raise UserError(f"{where} is {brief(data)}; expected {expected}.") from None
    rows = []
    for number, row in enumerate(each):
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: row {number} is {brief(row)}; expected a dict of the task's fields.")
        rows.append(dict(row))
    return rows


def _of_frame(frame: Any) -> Rows:
    """The rows of a pandas.DataFrame. A missing value, NaN, is a field that the row lacks, like a CSV's empty cell."""
    return [
        {str(name): value for name, value in row.items() if not (isinstance(value, float) and value != value)}
        for row in frame.to_dict("records")
    ]


def _rows_of_split(data: Any, task: Task, where: str) -> Rows:
    """A split's rows as its file will hold them, with the template's labels."""
    rows = [_as_json(row, task, f"{where}: row {number}") for number, row in enumerate(_rows(data, where))]
    rows = with_class_labels(rows, getattr(data, "features", None), task, where)
    return official_rows(rows, task.reader, f"{where}:")[0]


def _as_json(row: Mapping[str, Any], task: Task, where: str) -> dict[str, Any]:
    """The row in JSON's values. What JSON can't hold is left out where the template doesn't read that field."""
    read = {*task.fields, task.label, "idx"} if task.of_fields else row.keys()
    found = {}
    for name, value in row.items():
        try:
            found[name] = value if isinstance(value, str | int) else json.loads(json.dumps(value, default=_from_array))
        except (TypeError, ValueError):
            if name in read:
                raise UserError(
                    f"{where}: field {brief(name)} is {brief(value)}, of type {type(value).__name__}; expected text, a "
                    "number or what else JSON holds."
                ) from None
    return found


def _from_array(value: Any) -> Any:
    """A number or lists of them, for a scalar or an array of numpy's or torch's."""
    if not hasattr(value, "tolist"):
        raise TypeError(type(value).__name__)
    return value.tolist()


def rows_of(given: Any, task: Task) -> Rows:
    """Rows to answer: one or several, dicts or texts for a task with a single field; texts also as an array of numpy's
    or a pandas.Series; a Path is a file of rows. Raises UserError, for a text that is the name of such a file, too.
    """
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, str):
        if given.lower().endswith(ENDINGS) and is_file(given):
            raise UserError(
                f"{brief(given)} is a file, and a text is a row: give pathlib.Path({brief(given)}) for the rows in it, "
                "or a dict of the task's fields where the name itself is the text."
            )
        if len(task.fields) != 1 or not task.of_fields:
            raise UserError(
                f"Task {task.name} has the fields {', '.join(task.fields)}; give a dict of them, not a text."
            )
        return [{task.fields[0]: given}]
    if isinstance(given, Mapping):
        return official_rows([dict(given)], task.reader, "rows:")[0]
    if isinstance(given, Sequence) and given and all(isinstance(one, str) for one in given):
        return [row for one in given for row in rows_of(one, task)]
    return official_rows(_rows(given, "rows", _ROWS), task.reader, "rows:")[0]
