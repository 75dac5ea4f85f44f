#!/usr/bin/env python
"""The tables of docs/results.md from the rows of a study: scores, comparisons with the baseline, halves of the seeds,
and cross-entropies, where the rows have them (studies of older versions don't).

    python scripts/bench/few_shot_tables.py docs/few_shot/rows.csv --methods plain ptp-rn ptp-adv --seen SST2 Subj

--seen names the tasks on which the defaults were chosen: lines over these, and over the others, stand behind those over
all. --draws adds the spread over seeds of one draw. --baseline names the method that the others are compared with,
plain without it; --methods those that are shown, all without it. A study's own report has the same numbers in one
table; here are also lines over some of its tasks and seeds.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ptp_ds.commands.exits import run_command
from ptp_ds.errors import UserError
from ptp_ds.studies.report import shown_interval, shown_p, shown_ratio, shown_score
from ptp_ds.studies.statistics import Comparison, compare, compare_all, holm, spread_of

NAMES = {
    "plain": "plain prompt tuning", "ptp-rn": "PTP, noise (`--preset ptp-rn`)",
    "ptp-adv": "PTP, adversarial (`--preset ptp-adv`)",
    "ptp-adv-token": "the same with `--norm token_l2 --epsilon 0.022 --alpha 0.0165`",
    "ptp-adv-right": "the same with `--min_confidence 0.8 --confidence_in label`",
    "plain-text": "plain prompt tuning with `--prompt_init text`",
    "ptp-rn-text": "PTP, noise, with `--prompt_init text`",
    "ptp-adv-text": "PTP, adversarial, with `--prompt_init text`",
    "mask": "PTP, hidden words (`--perturbation mask`)", "free": "PTP, free (`--perturbation free`)",
    "a2t": "PTP, swapped words (`--perturbation a2t`)",
    "plain-average": "plain prompt tuning with `--average 0.95`",
    "plain-w5": "plain prompt tuning", "plain-lr01-w5": "plain, `--lr 0.01`",
    "ptp-rn-w5": "PTP, noise (`--preset ptp-rn`)", "ptp-adv-w5": "PTP, adversarial (`--preset ptp-adv`)",
    "ptp-adv-warm-w5": "the same with `--reg_warmup_steps 50`",
    "ptp-adv-right-w5": "the same with `--min_confidence 0.8 --confidence_in label`",
}  # fmt: skip
SHORT = {
    "plain": "plain", "ptp-rn": "noise", "ptp-adv": "adversarial", "ptp-adv-right": "adversarial, where right",
    "ptp-adv-token": "adversarial, by token",
    "plain-text": "plain, from a text", "ptp-rn-text": "noise, from a text", "ptp-adv-text": "adversarial, from a text",
    "mask": "hidden words", "free": "free", "a2t": "swapped words", "plain-average": "plain, mean prompt",
    "plain-lr01-w5": "plain, lower rate", "ptp-rn-w5": "noise", "ptp-adv-w5": "adversarial",
    "ptp-adv-warm-w5": "adversarial, rising", "ptp-adv-right-w5": "adversarial, where right",
}  # fmt: skip
BASE = "plain"
Pairs = dict[str, tuple[dict[int, float], dict[int, float]]]


class Rows:
    """The rows of rows.csv that have a score. scores, nats (cross-entropies): by task and method, then by seed.
    base: the baseline's name.

    methods: those that are read, all by default. Raises UserError where one of them, or the baseline, has no score.
    """

    def __init__(self, file: Path, base: str = BASE, methods: Sequence[str] | None = None) -> None:
        with file.open(newline="", encoding="utf-8") as stream:
            self.rows = [row for row in csv.DictReader(stream) if row["score"]]
        known = list(dict.fromkeys(row["method"] for row in self.rows))
        if absent := [method for method in methods or () if method not in known]:
            raise UserError(f"{file} has no score of {', '.join(absent)}; it has those of {', '.join(known)}.")
        self.rows = [row for row in self.rows if methods is None or row["method"] in methods]
        self.base = base
        self.scores: dict[tuple[str, str], dict[int, float]] = {}
        self.nats: dict[tuple[str, str], dict[int, float]] = {}
        for row in self.rows:
            cell, seed = (row["task"], row["method"]), int(row["seed"])
            self.scores.setdefault(cell, {})[seed] = float(row["score"])
            if row.get("cross_entropy"):
                self.nats.setdefault(cell, {})[seed] = float(row["cross_entropy"])
        self.tasks = list(dict.fromkeys(row["task"] for row in self.rows))
        self.methods = list(dict.fromkeys(row["method"] for row in self.rows))
        if base not in self.methods:
            raise UserError(
                f"{file} has no score of {base}, with which the other methods are compared; it has those of "
                f"{', '.join(self.methods) or 'no method'}: give --baseline one of its methods."
            )

    @property
    def others(self) -> list[str]:
        """The methods beside the baseline."""
        return [method for method in self.methods if method != self.base]

    def mean_of(self, column: str, task: str, method: str) -> float | None:
        """Of a column over the seeds; None where one of them has none."""
        own = [row[column] for row in self.rows if (row["task"], row["method"]) == (task, method)]
        return sum(map(float, own)) / len(own) if all(own) else None

    def pairs(self, method: str, seeds: Sequence[int] | None = None) -> Pairs:
        """The method's and the baseline's scores, of some seeds, of each task on which both have one of a seed."""
        found = {}
        for task in self.tasks:
            ours, theirs = self.scores.get((task, method), {}), self.scores.get((task, self.base), {})
            if seeds is not None:
                ours = {seed: score for seed, score in ours.items() if seed in seeds}
            if ours.keys() & theirs.keys():
                found[task] = ours, theirs
        return found


def scores_table(rows: Rows) -> list[str]:
    """Mean, standard deviation and worst seed of every cell, beside the untrained prompt and the majority class."""
    lines = ["| task | method | seeds | mean | standard deviation | worst seed | untrained | majority |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for task in rows.tasks:
        for method in rows.methods:
            if (task, method) in rows.scores:
                found = spread_of(list(rows.scores[task, method].values()))
                beside = (shown_score(rows.mean_of(column, task, method)) for column in ("untrained", "majority"))
                lines.append(
                    f"| {task} | {NAMES.get(method, method)} | {found.count} | {found.mean:.3f} | "
                    f"{shown_score(found.std)} | {found.least:.3f} | {' | '.join(beside)} |"
                )
    return lines


def comparison_table(rows: Rows, seen: Sequence[str]) -> list[str]:
    """Each method against the baseline: task by task with Holm's correction, then over all tasks, seen and unseen."""
    lines = ["| task | method | gain | interval | ratio of standard deviations | interval | p | p (Holm) "
             "| worst seed |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for method in rows.others:
        pairs = rows.pairs(method)
        found = {task: compare(*sides) for task, sides in pairs.items()}
        corrected = holm({task: one.p for task, one in found.items() if one is not None})
        lines += [_line(task, method, one, corrected[task]) for task, one in found.items() if one is not None]
        lines += [_line(name, method, one, None) for name, one in _over(pairs, seen).items()]
    return lines


def nats_table(rows: Rows) -> list[str]:
    """Cross-entropy on the reported rows of every cell that tells it, and how far it lies from the baseline's."""
    lines = ["| task | method | cross-entropy | standard deviation | highest | from the baseline's | interval | p |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (task, method), nats in rows.nats.items():
        found, one = spread_of(list(nats.values())), compare(nats, rows.nats.get((task, rows.base), {}))
        beside = "| | | |" if one is None or method == rows.base else (
            f"| {one.gain:+.3f} | {shown_interval(one.gain_interval, '+.3f')} | {shown_p(one.p)} |")  # fmt: skip
        lines.append(f"| {task} | {NAMES.get(method, method)} | {found.mean:.3f} | {shown_score(found.std)} | "
                     f"{max(nats.values()):.3f} {beside}")  # fmt: skip
    return lines if len(lines) > 2 else []


def _over(pairs: Pairs, seen: Sequence[str]) -> dict[str, Comparison]:
    """By their names, comparisons over all tasks of a method, the seen and the unseen; of several tasks each, once."""
    tasks, found = list(pairs), {}
    groups = [tasks, [task for task in tasks if task in seen], [task for task in tasks if task not in seen]]
    for place, group in enumerate(groups):
        if len(group) > 1 and (place == 0 or len(group) < len(tasks)):
            one = compare_all([pairs[task] for task in group])
            assert one is not None
            found[f"its {len(tasks)} tasks" if place == 0 else ", ".join(group)] = one
    return found


def _line(name: str, method: str, one: Comparison, corrected: float | None) -> str:
    return (
        f"| {name} | {SHORT.get(method, method)} | {one.gain:+.3f} | {shown_interval(one.gain_interval, '+.3f')} | "
        f"{shown_ratio(one.spread_ratio)} | {shown_interval(one.spread_interval, '.2f')} | {shown_p(one.p)} | "
        f"{'' if corrected is None else shown_p(corrected)} | {one.worst_gain:+.3f} |"
    )


def halves_table(rows: Rows) -> list[str]:
    """Mean, standard deviation and worst seed of the lower and the upper half of the seeds; nothing of one seed."""
    first, last = halves(rows)
    if not first:
        return []
    lines = [f"| task | method | seeds {first[0]} to {first[-1]}: mean, standard deviation, worst | seeds {last[0]} to "
             f"{last[-1]}: mean, standard deviation, worst |", "|---|---|---|---|"]  # fmt: skip
    for task in rows.tasks:
        for method in rows.methods:
            if (task, method) in rows.scores:
                shown = " | ".join(_half(rows.scores[task, method], half) for half in (first, last))
                lines.append(f"| {task} | {NAMES.get(method, method)} | {shown} |")
    return lines


def _half(scores: dict[int, float], seeds: Sequence[int]) -> str:
    own = [scores[seed] for seed in seeds if seed in scores]
    if not own:
        return "-"
    part = spread_of(own)
    return f"{part.mean:.3f}, {shown_score(part.std)}, {part.least:.3f}"


def halves(rows: Rows) -> tuple[list[int], list[int]]:
    """The seeds in order, cut in the middle."""
    seeds = sorted({seed for scores in rows.scores.values() for seed in scores})
    return seeds[: len(seeds) // 2], seeds[len(seeds) // 2 :]


def draws_table(rows: Rows, draws: int) -> list[str]:
    """Of every cell the standard deviation over all seeds, and within draws: of seeds that train on the same rows.

    draws: how many the study has, of which its seeds have one each in turn. Within: the root of the mean over draws of
    the variance (n - 1) of their seeds; of draws with two seeds or more.
    """
    lines = ["| task | method | standard deviation over all seeds | over seeds of one draw |", "|---|---|---|---|"]
    for (task, method), scores in rows.scores.items():
        stds = [spread_of([scores[seed] for seed in scores if seed % draws == draw]).std
                for draw in sorted({seed % draws for seed in scores})]  # fmt: skip
        known = [std**2 for std in stds if std is not None]
        within = math.sqrt(sum(known) / len(known)) if known else None
        over_all = spread_of(list(scores.values())).std
        lines.append(f"| {task} | {NAMES.get(method, method)} | {shown_score(over_all)} | {shown_score(within)} |")
    return lines


def later_seeds(rows: Rows, seen: Sequence[str]) -> list[str]:
    """What each method gains over the upper half of the seeds, on its tasks and on the seen ones, in words."""
    lines = []
    for method in rows.others:
        pairs = rows.pairs(method, halves(rows)[1])
        known = [task for task in pairs if task in seen]
        groups = {f"its {len(pairs)} tasks" if len(pairs) > 1 else "".join(pairs): list(pairs)}
        if len(known) < len(pairs):
            groups[", ".join(known)] = known
        for name, tasks in groups.items():
            one = compare_all([pairs[task] for task in tasks])
            if one is not None and one.gain_interval is not None:
                low, high = one.gain_interval
                lines.append(f"{SHORT.get(method, method)}, {name}, the later half of the seeds: {one.gain:+.3f} "
                             f"({low:+.3f} to {high:+.3f}), p {shown_p(one.p)}, {one.pairs} pairs")  # fmt: skip
    return lines


def main(argv: list[str]) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="rows.csv of a study")
    parser.add_argument("--seen", nargs="*", default=[], help="tasks on which the defaults were chosen")
    parser.add_argument("--draws", type=int, help="how many the study has: adds the spread over seeds of one draw")
    parser.add_argument("--baseline", default=BASE, help="the method that the others are compared with")
    parser.add_argument("--methods", nargs="+", help="those that are shown, the baseline among them; all without it")
    args = parser.parse_args(argv)
    rows = Rows(args.rows, args.baseline, args.methods)
    for part in (
        scores_table(rows),
        comparison_table(rows, args.seen),
        halves_table(rows),
        draws_table(rows, args.draws) if args.draws else [],
        nats_table(rows),
        later_seeds(rows, args.seen),
    ):
        if part:
            print("\n".join(part), end="\n\n")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
