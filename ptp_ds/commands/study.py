"""scripts/study.py: methods x tasks x seeds, a population each cell, then tables, pictures and comparisons."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ptp_ds.adapters.record import versions
from ptp_ds.commands.exits import run_command
from ptp_ds.commands.population import train_population
from ptp_ds.config.parsers import study_parser
from ptp_ds.errors import UserError
from ptp_ds.files import write_json, write_jsonl
from ptp_ds.ranks.distributed import env_rank, env_world, is_launched, prepare_environment, start_processes
from ptp_ds.ranks.log import get_logger
from ptp_ds.ranks.signals import end_at_once
from ptp_ds.studies.pictures import require_plot_extra, strip_plot
from ptp_ds.studies.report import Cells, majority_of, markdown, write_csv
from ptp_ds.studies.same_rows import require_one_task, require_rows, require_scored_alike
from ptp_ds.studies.study import Cell, Row, Study, finished, read_study, rows_of, with_one_batch

log = get_logger(__name__)


def run_study(study: Study, out: Path) -> int:
    """Trains the cells that have no result yet, on the ranks that this process is one of; the exit code of the first
    that was stopped, else 0. Raises UserError for a cell that can't run.
    """
    waiting = [cell for cell in study.cells if not finished(cell, out)]
    if is_launched():
        start_processes().barrier()  # nobody writes a cell before all have seen what is finished
    for number, cell in enumerate(waiting, start=1):
        log.info("\ncell %d of %d: %s, %d seeds", number, len(waiting), cell.name, len(cell.members))
        if code := train_cell(cell, out):
            return code
    return 0


def train_cell(cell: Cell, out: Path) -> int:
    """One cell as a population that goes on where it was left; returns the exit code. All ranks call it."""
    folder = cell.folder(out)
    run = replace(cell.run, output_dir=str(folder), resume="auto")
    try:
        return train_population(run, cell.explicit, cell.members)
    except UserError as error:
        raise UserError(f"Cell {cell.name}: {error}") from None


def write_report(study: Study, out: Path, title: str) -> Cells | None:
    """rows.jsonl, rows.csv, report.md and a picture a task of the cells that are finished; None where none is."""
    done = [cell for cell in study.cells if finished(cell, out)]
    rows = [row for cell in done for row in rows_of(cell, out)]
    if not rows:
        return None
    require_scored_alike(rows)
    part = replace(study, cells=tuple(done))
    cells = Cells(rows, part.tasks, part.methods, study.baseline)
    write_csv(out / "rows.csv", rows)
    write_jsonl(out / "rows.jsonl", [asdict(row) for row in rows])
    write_json(out / "versions.json", versions())
    pictures = [_picture(cells, task, out) for task in cells.tasks]
    (out / "report.md").write_text(markdown(cells, title, pictures), encoding="utf-8")
    _write_hparams(done, rows, out)
    return cells


def _picture(cells: Cells, task: str, out: Path) -> str:
    """The strip plot of a task; its file's name."""
    rows = [row for row in cells.rows if row.task == task]
    lines = {"untrained": sum(row.untrained_score for row in rows) / len(rows)}
    if (majority := majority_of(rows)) is not None:
        lines["majority"] = majority
    scores = {method: list(cells.scores(task, method).values()) for method in cells.methods}
    strip_plot(out / f"{task}.png", task, scores, lines)
    return f"{task}.png"


def _write_hparams(cells: Sequence[Cell], rows: Sequence[Row], out: Path) -> None:
    """Every prompt as a run of TensorBoard's hparams page: which settings differ between prompts, and its score.
    Written anew with each report: a cell may have been run again, and what differs depends on all of them.
    """
    from torch.utils.tensorboard import SummaryWriter

    settings = {(cell.task, cell.method, run.seed): asdict(run) for cell in cells for run in cell.runs.values()}
    differing = [
        name
        for name in next(iter(settings.values()))
        if len({str(one[name]) for one in settings.values()}) > 1 and name not in ("seed", "output_dir")
    ]
    for task in {row.task for row in rows}:
        shutil.rmtree(out / "tensorboard" / task, ignore_errors=True)
    for row in rows:
        if row.score is None:
            continue
        own = {name: str(settings[row.task, row.method, row.seed][name]) for name in differing}
        folder = out / "tensorboard" / row.task / row.method / f"seed-{row.seed}"
        with SummaryWriter(str(folder)) as board:
            hparams = {**own, "task": row.task, "method": row.method, "seed": row.seed}  # the study's name of the task
            board.add_hparams(hparams, {"hparam/score": row.score, "hparam/steps": float(row.steps)}, run_name=".")


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence on rank 0."""
    end_at_once()
    prepare_environment()
    return run_command(lambda: _study(sys.argv[1:] if argv is None else argv, description))


def _study(argv: Sequence[str], description: str) -> int:
    args = study_parser(description).parse_args(argv)
    require_plot_extra()
    study, out = read_study(args.study), Path(args.output_dir)
    require_one_task(study)
    if out.exists() and not out.is_dir():
        raise UserError(f"--output_dir {out} is a file; give a folder.")
    study = with_one_batch(study, out, env_world())
    part = study.part(args.methods, args.tasks)
    for cell in study.cells:  # the report takes all of them, whatever is trained now
        finished(cell, out)
    if args.report:
        code = 0
    else:
        require_rows(_with_finished(study, part, out), out)
        try:
            code = run_study(part, out)
        except UserError:
            _report(study, out, Path(args.study).stem)  # of what is finished
            raise
    if not code and not _report(study, out, Path(args.study).stem):
        raise UserError(f"No cell of {args.study} is finished in {out}.")
    return code


def _with_finished(study: Study, part: Study, out: Path) -> Study:
    """The part, and what its report will compare it with: the finished cells of its tasks."""
    beside = [cell for cell in study.cells if cell in part.cells or (cell.task in part.tasks and finished(cell, out))]
    return replace(study, cells=tuple(beside))


def _report(study: Study, out: Path, title: str) -> bool:
    """Writes and shows the report, on rank 0; whether there is one, true on the other ranks."""
    if env_rank() != 0:
        return True
    cells = write_report(study, out, title)
    if cells is not None:
        log.info("\n%s\n\nrows, report and pictures: %s", markdown(cells, title), out)
    return cells is not None
