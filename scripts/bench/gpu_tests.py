#!/usr/bin/env python
"""The tests that need a GPU, and those of the kernels, which are compiled on one; what they say, as a row."""

import re
import subprocess
import sys
from pathlib import Path

from gpu_record import NOT_ON_A_CPU, Record, part_parser

ROOT = Path(__file__).resolve().parents[2]
_FILES = ("choice", "noise", "perturb_step", "pack_embed", "dual_divergence")
SUITES = {  # of the marked tests the files alone: collecting all takes longer than running these
    "gpu": [
        "-m",
        "gpu",
        *sorted(str(file) for file in ROOT.glob("tests/*/test_*.py") if "mark.gpu" in file.read_text()),
    ],
    "kernels": ["-m", "not slow", *(f"tests/kernels/test_{name}.py" for name in _FILES)],
}
_CPUS_SHARE = ["-m", "not slow", "tests/kernels/test_choice.py"]  # in Triton's interpreter


def counts_of(line: str) -> dict[str, int]:
    """The numbers of pytest's last line: passed, failed, skipped, and so on."""
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|deselected|errors?)", line)}


def pytest(arguments: list[str]) -> tuple[int, str]:
    """(exit code, last line) of a run; its output passes."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *arguments]
    done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = ""
    assert done.stdout is not None
    for line in done.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return done.wait(), last


def main() -> int:
    parser = part_parser(__doc__)
    parser.add_argument("suite", choices=tuple(SUITES))
    args = parser.parse_args()
    record, wanted = Record(args.json), SUITES[args.suite]
    if args.dry:
        code, last = pytest(["--collect-only", *wanted])
        record.absent(args.suite, f"{NOT_ON_A_CPU} ({last})")
        if code or args.suite != "kernels":
            return int(code != 0)
        wanted = _CPUS_SHARE
    code, last = pytest(wanted)
    record.add(args.suite if not args.dry else "test_choice.py, interpreted", **counts_of(last), line=last)
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
