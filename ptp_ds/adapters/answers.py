"""What a row's scores say: its likeliest answer, and the probability of every one."""

from typing import Any

from torch import Tensor

from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split

_OF_SEVERAL = ("multirc", "record")  # readers whose rows hold several questions


def answer_lines(task: Task, split: Split, scores_NC: Tensor) -> list[dict[str, Any]]:
    """A line a context: its row (from 0) and idx, the likeliest answer, every answer's probability.

    scores_NC: candidate log-probabilities in tokenise's order. Answers are the template's labels, or the row's own
    names; their probabilities are a softmax over the row's answers. entry counts the contexts of a row with several.
    """
    lines: list[dict[str, Any]] = []
    scores = iter(scores_NC)
    for number, (row, where) in enumerate(zip(split.rows, split.where, strict=True)):
        for place, entry in enumerate(task.entries(row, where, labelled=False)):
            names = entry.names or task.labels
            shares = next(scores)[: len(names)].softmax(-1)
            line: dict[str, Any] = {"row": number, **({"idx": row["idx"]} if "idx" in row else {})}
            line |= {"entry": place} if task.reader in _OF_SEVERAL else {}
            line |= {"answer": names[int(shares.argmax())]}
            line |= {"probabilities": dict(zip(names, shares.tolist(), strict=True))}
            lines.append(line)
    return lines
