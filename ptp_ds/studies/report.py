"""A study's rows as tables: scores over seeds by method, comparisons with the baseline, csv and Markdown."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ptp_ds.studies.statistics import Comparison, Spread, compare, compare_all, holm, spread_of
from ptp_ds.studies.study import Row

ALL = "all tasks"
_CSV = ("task", "method", "seed", "score", "cross_entropy", "untrained", "majority", "best_step", "steps", "seconds",
        "failed")  # fmt: skip


@dataclass(frozen=True)
class Cells:
    """A study's outcome. tasks, methods: in the study's order. baseline: what methods are compared with."""

    rows: Sequence[Row]
    tasks: Sequence[str]
    methods: Sequence[str]
    baseline: str

    def of(self, task: str, method: str) -> list[Row]:
        """The rows of one cell, by seed."""
        return sorted((r for r in self.rows if (r.task, r.method) == (task, method)), key=lambda row: row.seed)

    def scores(self, task: str, method: str) -> dict[int, float]:
        """Scores by seed, of those that have one."""
        return {row.seed: row.score for row in self.of(task, method) if row.score is not None}

    def spread(self, task: str, method: str) -> Spread | None:
        """None where no seed has a score."""
        scores = list(self.scores(task, method).values())
        return spread_of(scores) if scores else None

    def comparison(self, task: str, method: str) -> Comparison | None:
        """The method against the baseline, over the seeds that both have, None without any; over pairs of task and seed
        for ALL, None where a task has no pair.
        """
        sides = [
            (self.scores(one, method), self.scores(one, self.baseline))
            for one in (self.tasks if task == ALL else [task])
        ]
        if task != ALL:
            return compare(*sides[0])
        return compare_all(sides) if all(ours.keys() & theirs.keys() for ours, theirs in sides) else None


def markdown(cells: Cells, title: str, pictures: Sequence[str] = ()) -> str:
    """report.md: a table of scores, then of comparisons. pictures: files beside it."""
    lines = [f"# {title}", "", *_scores(cells), ""]
    others = [method for method in cells.methods if method != cells.baseline]
    if others and cells.baseline in cells.methods:
        lines += [*_comparisons(cells, others), ""]
    lines += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n".join(lines).rstrip() + "\n"


def _scores(cells: Cells) -> list[str]:
    """Mean, spread and worst seed of every cell; the last lines are means over all tasks, of methods that have them."""
    lines = [
        "Scores of the kept prompts on the reported rows (mean of the task's metrics) over seeds: mean, standard "
        "deviation, worst seed and how far it lies below the mean; and their mean cross-entropy there, in nats a row: "
        "of two that are right as often, the lower one's probabilities mean more.", "",
        "| task | method | seeds | mean | std | worst | gap | cross-entropy | failed | untrained | majority |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for task in cells.tasks:
        for method in cells.methods:
            rows, spread = cells.of(task, method), cells.spread(task, method)
            if not rows:
                continue
            failed = sum(row.failed is not None for row in rows)
            shown = ["-"] * 4 if spread is None else [shown_score(x) for x in _of(spread)]
            lines.append(
                f"| {task} | {method} | {len(rows)} | {' | '.join(shown)} | {_cross_entropy(rows)} | {failed} | "
                f"{mean(row.untrained_score for row in rows):.3f} | {shown_score(majority_of(rows))} |"
            )
    if len(cells.tasks) > 1:
        for method in cells.methods:
            spreads = [cells.spread(task, method) for task in cells.tasks]
            if all(spread is not None for spread in spreads):
                means = zip(*(_of(spread) for spread in spreads if spread is not None), strict=True)
                shown = [shown_score(mean(column) if None not in column else None) for column in means]  # type: ignore[arg-type]
                lines.append(f"| {ALL} | {method} | | {' | '.join(shown)} | | | | |")
    return lines


def _cross_entropy(rows: Sequence[Row]) -> str:
    known = [row.cross_entropy for row in rows if row.cross_entropy is not None]
    return shown_score(mean(known) if known else None)


def majority_of(rows: Sequence[Row]) -> float | None:
    """The mean score of always giving the most frequent answer; None where an older run doesn't tell."""
    scores = [row.majority_score for row in rows]
    return None if None in scores else mean(scores)  # type: ignore[type-var]


def _of(spread: Spread) -> tuple[float, float | None, float, float]:
    return spread.mean, spread.std, spread.least, spread.gap


def shown_score(value: float | None) -> str:
    """To three digits, "-" for None."""
    return "-" if value is None else f"{value:.3f}"


def _comparisons(cells: Cells, methods: Sequence[str]) -> list[str]:
    lines = [
        f"Against {cells.baseline} on the same seeds: mean gain and ratio of standard deviations with 95 % bootstrap "
        "intervals over pairs (- where a task has fewer than five); p by sign flips, two-sided, then with Holm's "
        "correction over the tasks of a method; the worst seed's gain. Over all tasks: pairs of task and seed, "
        "standard deviations within tasks, the mean of the worst seeds' gains; only where the method has every "
        "task.", "",
        "| task | method | pairs | gain | interval | std ratio | interval | p | p (Holm) | worst seed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for method in methods:
        found = {task: cells.comparison(task, method) for task in cells.tasks}
        corrected = holm({task: one.p for task, one in found.items() if one is not None})
        if len(cells.tasks) > 1:
            found[ALL] = cells.comparison(ALL, method)
        for task, one in found.items():
            if one is None:
                continue
            p_holm = corrected.get(task)
            lines.append(
                f"| {task} | {method} | {one.pairs} | {one.gain:+.3f} | {shown_interval(one.gain_interval, '+.3f')} | "
                f"{shown_ratio(one.spread_ratio)} | {shown_interval(one.spread_interval, '.2f')} | {shown_p(one.p)} | "
                f"{shown_p(p_holm)} | {one.worst_gain:+.3f} |"
            )
    return lines


def shown_interval(bounds: tuple[float, float] | None, form: str) -> str:
    """Both bounds in a format, "-" for None."""
    return "-" if bounds is None else f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def shown_ratio(value: float | None) -> str:
    """To two digits, "-" for None."""
    return "-" if value is None else f"{value:.2f}"


def shown_p(value: float | None) -> str:
    """To four digits, "-" for None."""
    return "-" if value is None else f"{value:.4f}" if value >= 1e-4 else "< 0.0001"


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """A line a prompt; a metric that a task hasn't is left empty. untrained, majority: the mean
    of the metrics of the start and of always giving the most frequent answer."""
    metrics = sorted({name for row in rows for name in row.metrics or ()})
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [*_CSV, *metrics])
        writer.writeheader()
        for row in rows:
            values = {name: getattr(row, name) for name in _CSV}
            writer.writerow(
                {**(row.metrics or {}), **values, "untrained": row.untrained_score, "majority": row.majority_score}
            )
