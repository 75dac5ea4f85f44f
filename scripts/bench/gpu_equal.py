#!/usr/bin/env python
"""Whether a run gives the same prompt a second time, and when it is stopped half-way and resumed: to the bit.

Short rows, and long ones with answers of several tokens: there attention adds up runs of keys, and a score its tokens.
"""

import random
import shutil
from pathlib import Path
from typing import Any

from gpu_record import Record, part_parser
from safetensors.torch import load_file
from torch import Tensor

import ptp_ds
from ptp_ds.ranks.distributed import exit_process

LONG_TASK = {
    "name": "Long", "text": "{text}\nMood:", "truncate": "text", "label": "mood",
    "verbalizers": {"high": " very warm indeed", "low": " rather cold today", "none": " neither of the two"},
    "metrics": ["accuracy"],
}  # fmt: skip


def long_rows(count: int, words: int) -> list[dict[str, str]]:
    """Rows of about so many words, drawn from one seed."""
    chance, known = random.Random(0), ["a", "the", "film", "was", "is", "warm", "cold", "slow", "of", "and"]
    labels = list(LONG_TASK["verbalizers"])
    return [
        {"text": " ".join(chance.choices(known, k=words)), "mood": labels[number % len(labels)]}
        for number in range(count)
    ]


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
    words = 30 if args.dry else 1200
    long = {"data": {"train": long_rows(32, words), "val": long_rows(8, words)}, "task": LONG_TASK}
    for name, perturbation, more in (("gaussian", "gaussian", {}), ("pgd", "pgd", {}), ("long rows", "pgd", long)):
        check(record, name, args.folder / name.replace(" ", "_"), args.model, perturbation, whole, **more)
    return record.code


def check(record: Record, name: str, folder: Path, model: str, perturbation: str, whole: int, **more: Any) -> None:
    """A run of `whole` steps, a second one, and one in two halves."""
    with record.case(f"{name}, first run"):
        first = run(model, perturbation, whole, whole, folder / "first", **more)
        with record.case(f"{name}, second run"):
            again = run(model, perturbation, whole, whole, folder / "second", **more)
            compare(record, f"{name}, second run", again, first)
        with record.case(f"{name}, resumed"):
            run(model, perturbation, whole // 2, whole, folder / "halves", **more)
            halves = run(model, perturbation, whole, whole, folder / "halves", resume="auto", **more)
            compare(record, f"{name}, resumed", halves, first)


if __name__ == "__main__":
    exit_process(main())
