"""Few-shot draws of a user's rows: K a label to train on, K others to select on, and test rows that no draw holds.

What a draw takes follows from its name and from what rows say, as the task's template reads them: neither their order
nor their other fields count, nor any version.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief
from ptp_ds.tasks.rows import Rows
from ptp_ds.tasks.template import Task

Row = dict[str, Any]


@dataclass(frozen=True)
class Draws:
    """splits: rows by the split's name. repeated: rows left out as another says the same; disputed: rows left out as
    another says the same and has another label.
    """

    splits: dict[str, list[Row]]
    repeated: int
    disputed: int


@dataclass(frozen=True)
class _Said:
    """A row, and what it says: its texts and its label."""

    row: Row
    texts: str
    label: str


def draw_splits(task: Task, given: Rows, rows: int, draws: Sequence[str], test: int) -> Draws:
    """Splits few<rows>-<draw> and dev<rows>-<draw> for each draw, and test<test>.

    given: rows and their places. rows: of a label, in each of a draw's two splits. test: rows of the test split, in the
    shares of the labels that are left; 0 for none. Raises UserError for a task whose rows don't stand alone, for a row
    that its template can't read, and where a label or the test split has too few rows.
    """
    if task.reader != "flat":
        raise UserError(
            f"--task {task.name}: its rows hold several questions or belong together; draws are of rows that stand "
            "alone, each with a label."
        )
    read = [_said(task, row, place) for row, place in zip(*given, strict=True)]
    labels: dict[str, set[str]] = {}
    for one in read:
        labels.setdefault(one.texts, set()).add(one.label)
    agreed = [one for one in read if len(labels[one.texts]) == 1]
    first: dict[str, _Said] = {}
    for one in sorted(agreed, key=lambda one: json.dumps(one.row, sort_keys=True)):
        first.setdefault(one.texts, one)
    unique = list(first.values())
    splits: dict[str, list[_Said]] = {}
    for draw in draws:
        splits[f"few{rows}-{draw}"], splits[f"dev{rows}-{draw}"] = _one_draw(task, unique, rows, draw)
    if test:
        held = {one.texts for split in splits.values() for one in split}
        left = [one for one in unique if one.texts not in held]
        if len(left) < test:
            raise UserError(f"--test {test}: the draws leave {len(left)} rows; give fewer rows or draws, or --test 0.")
        splits[f"test{test}"] = sorted(left, key=_place_in("test"))[:test]
    written = {name: [one.row for one in split] for name, split in splits.items()}
    return Draws(written, len(agreed) - len(unique), len(read) - len(agreed))


def _said(task: Task, row: Row, place: str) -> _Said:
    rendered = task.render(row, place)
    return _Said(row, json.dumps([rendered.context, *rendered.candidates]), task.labels[rendered.gold])


def _one_draw(task: Task, unique: Sequence[_Said], rows: int, draw: str) -> tuple[list[_Said], list[_Said]]:
    taken: dict[str, list[_Said]] = {label: [] for label in task.labels}
    ordered = sorted(unique, key=_place_in(draw))
    for one in ordered:
        taken[one.label].append(one)
    fewest = min(taken, key=lambda label: len(taken[label]))
    if len(taken[fewest]) < 2 * rows:
        raise UserError(
            f"--rows {rows}: the label {brief(fewest)} has {len(taken[fewest])} rows; expected {2 * rows} or more of "
            f"each label, {rows} to train on and {rows} to select on."
        )
    few = {one.texts for of_label in taken.values() for one in of_label[:rows]}
    dev = {one.texts for of_label in taken.values() for one in of_label[rows : 2 * rows]}
    return [one for one in ordered if one.texts in few], [one for one in ordered if one.texts in dev]


def _place_in(draw: str) -> Callable[[_Said], bytes]:
    """The key that orders rows in a draw: a hash of the draw's name and what the row says."""
    return lambda one: hashlib.sha256(f"{draw}\n{one.texts}\n{one.label}".encode()).digest()
