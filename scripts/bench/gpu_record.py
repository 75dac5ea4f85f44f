"""What the parts of scripts/gpu_check.sh share: rows on disk as soon as they are known, cases that fail alone."""

import argparse
import json
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NOT_ON_A_CPU = "not on a CPU"


class Record:
    """The rows of one part, in its JSON file: written anew with every row, so that a part that is ended keeps them.

    file: None for no file, as on ranks that don't report. A row has the `case` that it belongs to, and either values,
    or `error`, or `absent`: why nothing was measured.
    """

    def __init__(self, file: str | Path | None, speaks: bool = True) -> None:
        self.file, self.speaks = Path(file) if file is not None else None, speaks
        self.rows: list[dict[str, Any]] = []
        self.failed = False
        self._write()

    def add(self, case: str, **values: Any) -> None:
        """One row, printed as well."""
        row = {"case": case, **values}
        self.rows.append(row)
        if self.speaks:
            print(json.dumps(row), flush=True)
        self._write()

    def absent(self, case: str, reason: str) -> None:
        """Nothing was measured, and why; no failure."""
        self.add(case, absent=reason)

    @contextmanager
    def case(self, name: str, may_not_fit: bool = False) -> Iterator[None]:
        """What is raised inside becomes a row and the part's failure, and the cases behind it run.

        may_not_fit: a device without the memory for it is a finding, not a failure.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.failed |= not may_not_fit
            self.add(name, **{"absent" if may_not_fit else "error": f"out of memory ({first_line(error)})"})
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            self.add(name, error=f"{type(error).__name__}: {first_line(error)}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def code(self) -> int:
        """The part's exit code."""
        return int(self.failed)

    def _write(self) -> None:
        if self.file is not None:
            work = self.file.with_name(f".{self.file.name}.writing")
            work.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
            os.replace(work, self.file)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [""])[0]


def part_parser(description: str | None) -> argparse.ArgumentParser:
    """The flags of every part."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes, for a machine without a GPU")
    parser.add_argument("--json", help="write the rows to this file")
    return parser
