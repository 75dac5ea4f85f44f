#!/usr/bin/env python
"""Everything that only a GPU shows (scripts/gpu_check.sh): parts in the order of their worth, each in its own process.

    bash scripts/gpu_check.sh                    # all parts
    bash scripts/gpu_check.sh --minutes 13       # as many as fit
    bash scripts/gpu_check.sh step_8b profile    # these, in this order
    bash scripts/gpu_check.sh --dry              # every part on a tiny random model, on the CPU

A part is ended at --limit seconds, and a part that fails doesn't end the others. Each part's rows are on disk as soon
as they are known; behind each part --out has a whole gpu_check.json. Exit code 1 where a part failed or was ended, 2
for a wrong call. No network is needed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts import BY_NAME, PARTS, Part
from gpu_report import machine, table, write_report

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
_GRACE = 10.0  # seconds that an ended part has for its own children
OK, FAILED, ENDED, NOT_RUN, INTERRUPTED = "ok", "failed", "ended at its limit", "not run: no time left", "interrupted"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all, {' '.join(BY_NAME)}")
    parser.add_argument("--dry", action="store_true", help="every part on a tiny random model, on the CPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for all parts together")
    parser.add_argument("--limit", type=float, default=float(os.environ.get("LIMIT", "600")), help="seconds of a part")
    parser.add_argument("--out", default=os.environ.get("OUT", "gpu_check"), help="folder of what is written")
    parser.add_argument("--list", action="store_true", help="say what the parts are, and run nothing")
    args = parser.parse_args()
    for name in args.parts:
        if name not in BY_NAME:
            parser.error(f"{name!r} is no part of this check; they are {', '.join(BY_NAME)}.")
    if not (args.minutes > 0 and args.limit > 0):
        parser.error("--minutes and --limit must be above 0.")
    return args


def environment(dry: bool, out: Path) -> dict[str, str]:
    """A part's: no network, the checkout's own package, no GPU in a dry run."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if dry:
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    return found


def run(command: list[str], log: Path, seconds: float, env: dict[str, str]) -> int | None:
    """The exit code, None where the time ran out; what it prints goes to the console and into `log`."""
    with log.open("w", encoding="utf-8") as kept:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                 env=env, cwd=ROOT, start_new_session=True)  # fmt: skip
        reader = threading.Thread(target=_copy, args=(child, kept), daemon=True)
        reader.start()
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(child)
            reader.join(timeout=_GRACE)


def _copy(child: subprocess.Popen, kept: Any) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        print(line, end="", flush=True)
        kept.write(line)
        kept.flush()


def _end(child: subprocess.Popen) -> None:
    """Ends what is left of a part's process group: first kindly, for launchers end their ranks then."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=_GRACE)


def run_part(part: Part, args: argparse.Namespace, python: str, model: str, left: float) -> dict[str, Any]:
    """Runs one part; its status, exit code and seconds."""
    out = Path(args.out).absolute()
    print(f"\n== {part.name}: {part.asks}", flush=True)
    (out / f"{part.name}.json").unlink(missing_ok=True)
    start = time.monotonic()
    command = part.command(python, str(HERE), str(out), model, args.dry)
    code = run(command, out / f"{part.name}.log", min(args.limit, left), environment(args.dry, out))
    status = ENDED if code is None else FAILED if code else OK
    return {"status": status, "exit_code": code, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    args = parse()
    if args.list:
        for part in PARTS:
            print(f"{part.name:13} {part.usual:4} s  {part.asks}")
        return 0
    begin = time.monotonic()
    python, out = os.environ.get("PYTHON") or sys.executable, Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    here = machine(python, environment(args.dry, out))
    if not (args.dry or here["gpus"]):
        print(f"error: no CUDA GPU is visible to torch in {python}; run this on a machine with one, or with --dry.",
              file=sys.stderr)  # fmt: skip
        return 2
    model = "smollm2-135m"
    if args.dry:
        model = str(out / "tiny")
        subprocess.run([python, str(HERE / "gpu_tiny.py"), model], env=environment(True, out), cwd=ROOT, check=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that no part outlives the check
    about = {**here, "dry": args.dry, "minutes": args.minutes if args.minutes < float("inf") else None}
    chosen = [BY_NAME[name] for name in args.parts] or list(PARTS)
    found: dict[str, dict[str, Any]] = {part.name: {"status": NOT_RUN} for part in chosen}
    for part in chosen:
        left = 60 * args.minutes - (time.monotonic() - begin)
        try:
            if left > (0 if args.dry else part.usual / 2):
                found[part.name] = {"status": INTERRUPTED}
                found[part.name] = run_part(part, args, python, model, left)
        finally:
            write_report(out, about, found)
    print(table(json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))))
    return int(any(one["status"] in (FAILED, ENDED) for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
