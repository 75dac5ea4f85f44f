#!/usr/bin/env python
"""Trains methods x tasks x seeds and scores the evaluation rows beside the selection rows at every evaluation.

    python scripts/bench/curves.py study.json --out runs/curves            # trains what --out doesn't hold yet
    python scripts/bench/curves.py study.json --out runs/curves --report   # prints the table alone

It answers what a result.json can't: which rule of selection chooses better prompts, and after how many steps. Several
processes may share --out; each takes a cell that no other is at, and a cell whose process died is taken again.

study.json: {"flags": {...}, "tasks": {name: {...}}, "methods": {name: {...}}, "seeds": [0, 1], "draws": [13, 21]}
flags, and each task's and method's: settings of scripts/train.py without dashes; "{draw}" in a value becomes the
seed's draw.
"""

import argparse
import fcntl
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import ptp_ds.commands.train as train_command
from ptp_ds.adapters.card import untrained_metrics
from ptp_ds.commands.exits import run_command
from ptp_ds.config.flags import parse_run
from ptp_ds.errors import UserError
from ptp_ds.files import read_json, write_json
from ptp_ds.ranks.distributed import prepare_environment
from ptp_ds.ranks.faults import OutputGuard
from ptp_ds.training.evaluate import Evaluation, least_score
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.progress import Progress
from ptp_ds.training.trainer import Trainer


class Point(NamedTuple):
    """One evaluation. select_rows: how many rows select and select_ce are means over."""

    step: int
    select: float
    select_ce: float
    val: float
    val_ce: float
    select_rows: int


def near_the_highest(curve: Sequence[Point]) -> list[Point]:
    """Those whose score lies within a standard error of the highest (Breiman et al. 1984)."""
    least = least_score(max(point.select for point in curve), curve[0].select_rows)
    return [point for point in curve if point.select >= least]


RULES: dict[str, Callable[[Sequence[Point]], Point]] = {
    "near, latest": lambda curve: near_the_highest(curve)[-1],  # what a run does
    "near, ce": lambda curve: min(near_the_highest(curve), key=lambda point: point.select_ce),
    "score, ce": lambda curve: max(curve, key=lambda point: (point.select, -point.select_ce)),
    "ce": lambda curve: min(curve, key=lambda point: point.select_ce),
    "last": lambda curve: curve[-1],
}


class Cell(NamedTuple):
    """One run of the study. settings: train.py's."""

    task: str
    method: str
    seed: int
    settings: dict[str, Any]

    @property
    def file(self) -> str:
        return f"{self.task}-{self.method}-{self.seed}.json"


def cells_of(study: dict[str, Any]) -> list[Cell]:
    """Every run, seeds outermost, so that what is there at any time has all methods."""
    found, draws = [], study.get("draws", [0])
    for seed, task, method in itertools.product(study["seeds"], study["tasks"], study["methods"]):
        settings = {**study.get("flags", {}), **study["tasks"][task], **study["methods"][method], "seed": seed}
        draw = str(draws[seed % len(draws)])
        drawn = {k: v.replace("{draw}", draw) if isinstance(v, str) else v for k, v in settings.items()}
        found.append(Cell(task, method, seed, drawn))
    return found


@contextmanager
def watched(scored: list[tuple[Evaluation, Evaluation]]) -> Iterator[None]:
    """Inside, a run that scores its selection rows scores its evaluation rows, too; both go to `scored`."""
    prepare, select, prepared = train_command.prepare, Trainer.select, []

    def remembered(*given: Any) -> Prepared:
        prepared.append(prepare(*given))
        return prepared[-1]

    def both(self: Trainer, progress: Progress, prompt: Tensor, result: Evaluation, output: OutputGuard) -> None:
        scored.append((result, self.evaluate(prompt, prepared[-1].examples.evaluation)))
        select(self, progress, prompt, result, output)

    train_command.prepare, Trainer.select = remembered, both  # type: ignore[method-assign]
    try:
        yield
    finally:
        train_command.prepare, Trainer.select = prepare, select  # type: ignore[method-assign]


def train(cell: Cell, file: Path) -> None:
    """Runs a cell and writes its record."""
    scored: list[tuple[Evaluation, Evaluation]] = []
    with tempfile.TemporaryDirectory() as folder, watched(scored):
        words = [word for name, value in cell.settings.items() for word in (f"--{name}", str(value))]
        run, explicit = parse_run([*words, "--output_dir", f"{folder}/run", "--save_every", "0"])
        code = train_command.train(run, explicit)
        if code:
            raise UserError(f"{cell.file} was stopped with code {code}; run the same command again.")
        result = read_json(f"{folder}/run/result.json", "the result")
        lines = map(json.loads, (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines())
        steps = [line["step"] for line in lines if line["kind"] == "select"]
    curve = [
        Point(step, select.score, select.cross_entropy, held.score, held.cross_entropy, select.examples)
        for step, (select, held) in zip(steps, scored, strict=True)
    ]
    record = {"settings": cell.settings, "curve": curve, "result": result}
    write_json(file, record)


def train_missing(cells: Sequence[Cell], out: Path) -> None:
    """Each cell that has no record and that no living process is at."""
    out.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        file = out / cell.file
        with open(out / f".{cell.file}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process
            except BlockingIOError:
                continue
            if not file.is_file():
                train(cell, file)


def report(cells: Sequence[Cell], out: Path) -> list[dict[str, Any]]:
    """A row for each task and method that has records: what each rule's choice scores on the evaluation rows."""
    rows = []
    for (task, method), group in itertools.groupby(sorted(cells), key=lambda cell: (cell.task, cell.method)):
        records = [read_json(out / cell.file, cell.file) for cell in group if (out / cell.file).is_file()]
        if not records:
            continue
        row: dict[str, Any] = {"task": task, "method": method, "seeds": len(records), "rules": {}}
        row["untrained"] = [statistics.mean(untrained_metrics(record["result"]).values()) for record in records]
        for name, rule in RULES.items():
            chosen = [rule([Point(*point) for point in record["curve"]]) for record in records]
            row["rules"][name] = {"val": [point.val for point in chosen], "val_ce": [point.val_ce for point in chosen]}
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} {deviation:.3f} {min(values):.3f}"


def print_report(rows: Sequence[dict[str, Any]]) -> None:
    print("score on the evaluation rows of the prompt that each rule chooses: mean, standard deviation, least; mean ce")
    print(f"{'task':12}{'method':16}{'seeds':>5}  {'untrained':19}" + "".join(f"{name:25}" for name in RULES))
    for row in rows:
        chosen = (f"{spread(rule['val'])} {statistics.mean(rule['val_ce']):5.2f}" for rule in row["rules"].values())
        print(f"{row['task']:12}{row['method']:16}{row['seeds']:5}  {spread(row['untrained']):19}"
              + "".join(f"{text:25}" for text in chosen))  # fmt: skip


def read_study(file: str) -> dict[str, Any]:
    """The study; UserError for what is missing in it."""
    study = read_json(file, file)
    missing = [name for name in ("tasks", "methods", "seeds") if name not in study]
    if missing:
        raise UserError(f"{file} has no {' and no '.join(missing)}; the script's --help shows what a study holds.")
    return study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="JSON file")
    parser.add_argument("--out", required=True, help="folder of the records, one JSON a run")
    parser.add_argument("--report", action="store_true", help="trains nothing")
    parser.add_argument("--json", help="write the report's rows to this file")
    args = parser.parse_args()
    prepare_environment()
    cells, out = cells_of(read_study(args.study)), Path(args.out)
    if not args.report:
        train_missing(cells, out)
    rows = report(cells, out)
    print_report(rows)
    if args.json:
        write_json(Path(args.json), rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
