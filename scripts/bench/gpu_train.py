#!/usr/bin/env python
"""Trains the same steps in fp32, bf16 and fp16: finite losses that fall, scores, tokens a second, peak memory.

fp16 goes through DeepSpeed's dynamic loss scaling, which a CPU doesn't have. On a GPU a mean loss of the last third of
the steps that isn't below that of the first third is a failure.
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
from gpu_record import NOT_ON_A_CPU, Record, part_parser

import ptp_ds
from ptp_ds.ranks.distributed import exit_process


def losses_of(folder: Path) -> list[float]:
    """The losses of a run's log, in order."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def train(model: str, precision: str, steps: int, folder: Path) -> dict[str, Any]:
    """One run, and what is told of it."""
    shutil.rmtree(folder, ignore_errors=True)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    result = ptp_ds.train(
        model=model, precision=precision, max_steps=steps, log_every=1, eval_every=0, save_every=0, batch_size=16,
        output_dir=folder, verbose=False, report_to="none",
    )  # fmt: skip
    losses, record = losses_of(folder), result.record
    third = max(1, steps // 3)
    return {
        "first_loss": statistics.mean(losses[:third]), "last_loss": statistics.mean(losses[-third:]), "losses": losses,
        "metrics": record["metrics"], "untrained": record["untrained"],
        "tokens_per_second": record["tokens_per_second"], "step_seconds": record["step_seconds_median"],
        "peak_bytes": record["peak_memory_bytes"] if torch.cuda.is_available() else None,  # else of all runs so far
    }  # fmt: skip


def main() -> int:
    parser = part_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    args = parser.parse_args()
    record, cuda = Record(args.json), torch.cuda.is_available()
    for precision in ("bf16", "fp16", "fp32"):
        if precision == "fp16" and not cuda:
            record.absent(precision, NOT_ON_A_CPU)
            continue
        with record.case(precision):
            found = train(args.model, precision, 3 if args.dry else 60, args.folder / precision)
            record.add(precision, **found)
            if not args.dry and not found["last_loss"] < found["first_loss"]:
                raise ValueError(f"the loss went from {found['first_loss']:.3f} to {found['last_loss']:.3f}")
    return record.code


if __name__ == "__main__":
    exit_process(main())
