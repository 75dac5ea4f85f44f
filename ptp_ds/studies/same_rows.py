"""Whether a study's cells belong together: one task, the same reported rows, and finished cells of the rows that the
files hold now. What is wrong is said before anything is trained.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.studies.study import Cell, Row, Study, finished, members_on_record
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import load_split
from ptp_ds.tasks.template import load_task, same_spec
from ptp_ds.training.examples import split_names


def require_one_task(study: Study) -> None:
    """UserError where methods or seeds are compared on what are two tasks, or on one with other metrics."""
    read = functools.cache(load_task)
    first: dict[str, tuple[str, Task]] = {}
    for cell in study.cells:
        for name, run in cell.runs.items():
            where = cell.name if run.task == cell.run.task else f"{cell.name}, {name},"
            task = read(run.task)
            other, wanted = first.setdefault(cell.task, (where, task))
            if (task.name, task.metrics) != (wanted.name, wanted.metrics):
                raise UserError(
                    f"{where} is of task {task.name} ({', '.join(task.metrics)}), {other} of {wanted.name} "
                    f"({', '.join(wanted.metrics)}); methods and seeds are compared on one task with the same metrics."
                )


def require_rows(part: Study, out: Path) -> None:
    """UserError for rows that can't be read, for methods of a task that report other rows than each other, and for a
    finished cell that was run on other rows, or with another template, than the files hold now.
    """
    read = functools.cache(lambda task, *source: load_split(load_task(task), *source).digest)
    reported: dict[tuple[str, str], tuple[str, str]] = {}
    for cell in part.cells:
        on_record = members_on_record(cell, out) if finished(cell, out) else {}
        for name, run in cell.runs.items():
            try:
                now = {use: read(run.task, split, run.data_dir, run.dataset) for use, split in split_names(run).items()}
            except UserError as error:
                raise UserError(f"Cell {cell.name}, {name}: {error}") from None
            other, digest = reported.setdefault((cell.task, name), (cell.name, now["eval"]))
            if digest != now["eval"]:
                raise UserError(
                    f"{cell.name} and {other} report other rows of {name}; methods are compared on the same rows."
                )
            if name in on_record:
                _require_as_recorded(cell, run, on_record[name], now, out)


def _require_as_recorded(cell: Cell, run: RunConfig, record: dict[str, Any], now: dict[str, str], out: Path) -> None:
    """run, record: a member's. Records of older versions don't say what their rows were; they are taken as they are."""
    changed = [f"{use} rows" for use, digest in now.items() if record.get("rows", now).get(use) != digest]
    spec = load_task(run.task).spec()
    if not same_spec(record.get("template", spec), spec):
        changed.append("template")
    if changed:
        raise UserError(
            f"{cell.folder(out) / 'population.json'} was run with other {' and '.join(changed)} than the files hold "
            "now; give another --output_dir, or remove that cell's folder."
        )


def require_scored_alike(rows: Sequence[Row]) -> None:
    """UserError where two methods' records of one task and seed tell of other reported rows."""
    first: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row.rows is None:
            continue
        other = first.setdefault((row.task, row.seed), row)
        if other.rows is not None and other.rows["eval"] != row.rows["eval"]:
            raise UserError(
                f"{row.task}/{row.method} and {row.task}/{other.method} were scored on other rows of seed {row.seed}; "
                "remove one cell's folder and run it again."
            )
