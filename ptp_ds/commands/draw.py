"""scripts/draw.py: few-shot draws of a user's rows, as files that a study names with {draw}."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ptp_ds.commands.exits import run_command
from ptp_ds.config.parsers import draw_parser
from ptp_ds.errors import UserError
from ptp_ds.files import is_folder, nearest_existing, plain_name, write_jsonl
from ptp_ds.tasks import load_task
from ptp_ds.tasks.draws import draw_splits
from ptp_ds.tasks.rows import rows_of_file

_DRAWN = re.compile(r"(few|dev)\d+-.+|test\d+")  # names of splits that a call makes


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence."""
    return run_command(lambda: _draw(sys.argv[1:] if argv is None else argv, description))


def _draw(argv: Sequence[str], description: str) -> None:
    args = draw_parser(description).parse_args(argv)
    for flag, value, least in (("--rows", args.rows, 1), ("--test", args.test, 0)):
        if value < least:
            raise UserError(f"{flag} is {value}; expected {least} or more.")
    draws = [plain_name(draw, "--draws") for draw in args.draws]
    if twice := next((draw for place, draw in enumerate(draws) if draw in draws[:place]), None):
        raise UserError(f"--draws has {twice} twice; give each once.")
    task = load_task(args.task)
    out = Path(args.data_dir) / task.name
    if there := next((file for file in sorted(out.glob("*.jsonl")) if _DRAWN.fullmatch(file.stem)), None):
        raise UserError(
            f"{there} is there already; name all draws in one call, so that no draw holds test rows, and give a "
            "--data_dir without any."
        )
    if not is_folder(above := nearest_existing(out)):
        raise UserError(f"--data_dir {args.data_dir}: {above} is a file; give a folder.")
    found = draw_splits(task, rows_of_file(Path(args.file)), args.rows, draws, args.test)
    for name, rows in found.splits.items():
        file = out / f"{name}.jsonl"
        write_jsonl(file, rows)
        print(f"{file}: {len(rows)} rows")
    if found.repeated:
        print(f"{found.repeated} rows were left out: another says the same.")
    if found.disputed:
        print(f"{found.disputed} rows were left out: another says the same and has another label.")
