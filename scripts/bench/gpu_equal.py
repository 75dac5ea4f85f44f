#!/usr/bin/env python
"""Whether a run gives the same prompt a second time, and when it is stopped half-way and resumed: to the bit."""

import shutil
from pathlib import Path
from typing import Any

from gpu_record import Record, part_parser
from safetensors.torch import load_file
from torch import Tensor

import ptp_ds
from ptp_ds.ranks.distributed import exit_process


def prompt_of(folder: Path, step: int) -> Tensor:
    """The weight in a run's checkpoint behind a step."""
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "state.safetensors")["prompt"]


def run(model: str, perturbation: str, steps: int, whole: int, folder: Path, **more: Any) -> Tensor:
    """Trains to step `steps` of `whole`, and gives the prompt."""
    ptp_ds.train(
        model=model, perturbation=perturbation, max_steps=steps, schedule_steps=whole, eval_every=0, save_every=steps,
        log_every=whole, batch_size=8, output_dir=folder, verbose=False, report_to="none", **more,
    )  # fmt: skip
    return prompt_of(folder, steps)


def compare(record: Record, case: str, found: Tensor, expected: Tensor) -> None:
    """A row, and a failure where they differ."""
    apart = float((found - expected).abs().max())
    equal = bool((found == expected).all())
    record.add(case, equal=equal, largest_difference=apart)
    if not equal:
        raise ValueError(f"prompts differ by up to {apart:.1e}")


def main() -> int:
    parser = part_parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    args = parser.parse_args()
    record, whole = Record(args.json), 4 if args.dry else 8
    shutil.rmtree(args.folder, ignore_errors=True)
    for perturbation in ("gaussian", "pgd"):
        folder = args.folder / perturbation
        with record.case(f"{perturbation}, first run"):
            first = run(args.model, perturbation, whole, whole, folder / "first")
            with record.case(f"{perturbation}, second run"):
                again = run(args.model, perturbation, whole, whole, folder / "second")
                compare(record, f"{perturbation}, second run", again, first)
            with record.case(f"{perturbation}, resumed"):
                run(args.model, perturbation, whole // 2, whole, folder / "halves")
                halves = run(args.model, perturbation, whole, whole, folder / "halves", resume="auto")
                compare(record, f"{perturbation}, resumed", halves, first)
    return record.code


if __name__ == "__main__":
    exit_process(main())
