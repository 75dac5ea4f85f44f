"""Few-shot draws of a user's rows: K a label to train on, K others to select on, and test rows that no draw holds.

What a draw takes follows from the rows and the draw's name alone: neither their order nor any version counts.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief, listed
from ptp_ds.tasks.rows import Rows

Row = dict[str, Any]
_NUMBER = "idx"  # a row's own number, which tells nothing of what it says


def draw_splits(
    given: Rows, label: str, rows: int, draws: Sequence[str], test: int
) -> tuple[dict[str, list[Row]], int]:
    """The splits by name, and how many rows were left out since an earlier one says the same.

    Named few<rows>-<draw> and dev<rows>-<draw> for each draw, and test<test>.

    given: rows and their places. label: the field of the label. rows: of a label, in each of a draw's two splits.
    test: rows of the test split, in the shares of the labels that are left; 0 for none. Raises UserError for a row
    without a label, and where a label or the test split has too few rows.
    """
    unique = _unique(given, label)
    splits: dict[str, list[Row]] = {}
    for draw in draws:
        few, dev = _one_draw(unique, label, rows, draw)
        splits[f"few{rows}-{draw}"], splits[f"dev{rows}-{draw}"] = few, dev
    if test:
        held = {id(row) for split in splits.values() for row in split}
        left = [row for row in unique if id(row) not in held]
        if len(left) < test:
            raise UserError(f"--test {test}: the draws leave {len(left)} rows; give fewer rows or draws, or --test 0.")
        splits[f"test{test}"] = sorted(left, key=_place_in("test"))[:test]
    return splits, len(given[0]) - len(unique)


def _unique(given: Rows, label: str) -> list[Row]:
    """The first row of each that say the same, their labels and numbers aside."""
    found: dict[str, Row] = {}
    for row, place in zip(*given, strict=True):
        if not isinstance(row.get(label), str | int):
            raise UserError(
                f"{place}: the label is {brief(row.get(label))}; expected text or a whole number in the field "
                f"{label!r}, of {listed(row)}. --label names another field."
            )
        found.setdefault(_text_of({name: value for name, value in row.items() if name not in (label, _NUMBER)}), row)
    return list(found.values())


def _one_draw(unique: Sequence[Row], label: str, rows: int, draw: str) -> tuple[list[Row], list[Row]]:
    taken: dict[Any, list[Row]] = {}
    ordered = sorted(unique, key=_place_in(draw))
    for row in ordered:
        taken.setdefault(row[label], []).append(row)
    fewest = min(taken, key=lambda value: len(taken[value]), default=None)
    if fewest is None or len(taken[fewest]) < 2 * rows:
        which = "the file has no rows" if fewest is None else f"{brief(fewest)} has {len(taken[fewest])} rows"
        raise UserError(
            f"--rows {rows}: {which}; expected {2 * rows} or more of each label, {rows} to train on and {rows} to "
            "select on."
        )
    few = {id(row) for of_label in taken.values() for row in of_label[:rows]}
    dev = {id(row) for of_label in taken.values() for row in of_label[rows : 2 * rows]}
    return [row for row in ordered if id(row) in few], [row for row in ordered if id(row) in dev]


def _place_in(draw: str) -> Callable[[Row], bytes]:
    """The key that orders rows in a draw: a hash of the draw's name and the row."""
    return lambda row: hashlib.sha256(f"{draw}\n{_text_of(row)}".encode()).digest()


def _text_of(row: Row) -> str:
    return json.dumps(row, sort_keys=True)
