"""Prediction files as SuperGLUE's server takes them: jsonl, one object a row of the official file.

    RTE, CB, AX-b, AX-g   {"idx": 0, "label": "entailment"}
    BoolQ, WiC            {"idx": 0, "label": "true"}
    WSC                   {"idx": 0, "label": "True"}
    COPA                  {"idx": 0, "label": 1}
    MultiRC               {"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 1}]}]}}
    ReCoRD                {"idx": 0, "label": "the entity's text"}, a line a query, by the query's idx

The spelling of the labels, WSC's capitals included, and the files' names, <Task>.jsonl, are those of jiant, the
benchmark authors' own toolkit (super_glue_format_preds of its tasks). The task's reader says which form it is.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.tasks import Rendered, Task
from ptp_ds.tasks.data import Split
from ptp_ds.tasks.readers import whole_number

Line = dict[str, Any]


@dataclass(frozen=True)
class _Predicted:
    """A row of the file and the candidate chosen for each of its entries."""

    row: Mapping[str, Any]
    entries: Sequence[Rendered]
    chosen: Sequence[int]
    where: str

    def idx(self, part: Mapping[str, Any], what: str = "row") -> int | str:
        """The official number of the row or of a part of it."""
        found = part.get("idx")
        if isinstance(found, bool) or not isinstance(found, int | str) or found == "":
            raise UserError(
                f"{self.where}: the {what} has no idx; a prediction file needs the official files' numbers."
            )
        return whole_number(found)


def _label(task: Task, choice: int) -> int | str:
    """The chosen label as the files spell it: a number where it is one."""
    label = task.labels[choice]
    return int(label) if re.fullmatch(r"-?\d+", label) else label


def _plain(task: Task, found: _Predicted) -> list[Line]:
    return [{"idx": found.idx(found.row), "label": _label(task, choice)} for choice in found.chosen]


def _truth(task: Task, found: _Predicted) -> list[Line]:
    return [{"idx": found.idx(found.row), "label": str(choice == 0)} for choice in found.chosen]  # option 0: the span


def _entities(task: Task, found: _Predicted) -> list[Line]:
    queries = zip(found.row["qas"], found.entries, found.chosen, strict=True)
    return [{"idx": found.idx(query, "query"), "label": entry.names[choice]} for query, entry, choice in queries]


def _passage(task: Task, found: _Predicted) -> list[Line]:
    rest, questions = iter(found.chosen), []
    for question in found.row["passage"]["questions"]:
        answers = [
            {"idx": found.idx(answer, "answer"), "label": _label(task, next(rest))} for answer in question["answers"]
        ]
        questions.append({"idx": found.idx(question, "question"), "answers": answers})
    return [{"idx": found.idx(found.row), "passage": {"questions": questions}}]


_FORMATS: dict[str, Callable[[Task, _Predicted], list[Line]]] = {
    "flat": _plain, "pairs": _plain, "multirc": _passage, "record": _entities, "wsc": _truth,
}  # fmt: skip


def prediction_lines(task: Task, split: Split, chosen: Sequence[int]) -> list[Line]:
    """The file's objects, in the rows' order. chosen: each example's candidate, in tokenise's order.

    Rows of a plain template may have no idx, then their number in the split stands for it; elsewhere a missing one is
    a ValueError, which names the row.
    """
    lines: list[Line] = []
    rest = iter(chosen)
    for number, (row, where) in enumerate(zip(split.rows, split.where, strict=True)):
        entries = task.entries(row, where, labelled=False)
        choices = [next(rest) for _ in entries]
        row = {"idx": number, **row} if task.reader == "flat" else row
        lines += _FORMATS[task.reader](task, _Predicted(row, entries, choices, where))
    assert next(rest, None) is None, "as many choices as examples"
    return lines


def check_numbers(task: Task, split: Split, examples: int) -> None:
    """Raises prediction_lines' ValueError before anything is computed. examples: how many the split has."""
    prediction_lines(task, split, [0] * examples)
