#!/usr/bin/env python
"""Trains the same steps in several precisions and seeds; prints loss curves beside each other, scores and their spread.

Exit code 1 where a precision's mean score lies further from the first one's than two standard deviations of a seed.
Flags that this script doesn't know go to scripts/train.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent


def train(precision: str, seed: int, steps: int, folder: Path, more: list[str]) -> tuple[dict[int, float], dict]:
    """(loss by step, result.json) of one run."""
    output = folder / f"{precision}-{seed}"
    flags = {"precision": precision, "seed": seed, "max_steps": steps, "log_every": max(1, steps // 10),
             "eval_every": 0, "output_dir": output}  # fmt: skip
    command = [
        sys.executable,
        SCRIPTS / "train.py",
        *(str(word) for name in flags for word in (f"--{name}", flags[name])),
    ]
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{precision} seed {seed} failed:\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return losses, json.loads((output / "result.json").read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", help="write curves and scores to this file")
    args, more = parser.parse_known_args()
    curves: dict[str, list[dict[int, float]]] = {}
    scores: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in args.precisions:
            for seed in args.seeds:
                losses, result = train(precision, seed, args.steps, Path(folder), more)
                curves.setdefault(precision, []).append(losses)
                scores.setdefault(precision, []).append(statistics.mean(result["metrics"].values()))
    print("loss, mean over seeds")
    print("step  " + "".join(f"{precision:>10}" for precision in args.precisions))
    for step in curves[args.precisions[0]][0]:
        means = [statistics.mean(curve[step] for curve in curves[precision]) for precision in args.precisions]
        print(f"{step:5} " + "".join(f"{mean:10.4f}" for mean in means))
    first = scores[args.precisions[0]]
    noise = statistics.stdev(first) if len(first) > 1 else 0.0
    apart = {}
    for precision, found in scores.items():
        apart[precision] = abs(statistics.mean(found) - statistics.mean(first))
        print(f"{precision}: score {statistics.mean(found):.4f}, seeds {' '.join(f'{score:.4f}' for score in found)}")
    print(f"a seed's standard deviation in {args.precisions[0]}: {noise:.4f}")
    if args.json:
        report = {"curves": curves, "scores": scores, "seed_deviation": noise}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if any(gap > 2 * noise for gap in apart.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
