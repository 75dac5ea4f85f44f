#!/usr/bin/env python
"""Ranks and where weights lie: two ranks against one, hpZ, int8 gathers, ZeRO-2, and weights in the host's memory.

Each case is a run of its own, by torchrun where it has several ranks: a random model, with the same weights and on the
same rows whatever the ranks. difference: relative l2 distance of the prompt's first gradient from that of one rank
under ZeRO-3 in the same precision. gathered_gb_per_second: bytes of gathered weights over the whole step's time. A
CPU's ranks talk by gloo.
"""

import argparse
import json
import os
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_measure import peak_of
from bench_random import config_of_shape, open_random, random_examples, timed_steps
from gpu_check import run as run_logged
from gpu_record import NOT_ON_A_CPU, Record, part_parser
from safetensors.torch import load_file, save_file

from ptp_ds.commands.exits import run_command
from ptp_ds.config.run_config import RunConfig
from ptp_ds.ranks.distributed import exit_process, prepare_environment, start_processes

_LIMIT = 120.0  # seconds of a case


@dataclass(frozen=True)
class Case:
    """bound: of the difference; None where weights are rounded on their way."""

    name: str
    ds_config: str
    world: int
    precision: str = "bf16"
    bound: float | None = 0.1

    @property
    def cuda_alone(self) -> bool:
        """Whether a CPU can't run it."""
        return self.ds_config == "zero3_quantized"


ALONE = {precision: Case(f"one rank, {precision}", "zero3", 1, precision, 0.0) for precision in ("bf16", "fp32")}
CASES = [
    *ALONE.values(),
    Case("one rank, weights in the host's memory", "zero3_offload", 1),
    Case("two ranks, fp32", "zero3", 2, "fp32", 1e-4),
    Case("two ranks, bf16", "zero3", 2),
    Case("two ranks, hpZ", "zero3_hpz", 2),
    Case("two ranks, int8 gathers", "zero3_quantized", 2, bound=None),
    Case("two ranks, ZeRO-2", "zero2", 2),
    Case("two ranks, weights in the host's memory", "zero3_offload", 2),
]


def work(case: Case, dry: bool, file: Path) -> None:
    """What every rank of a case does; rank 0 writes what it measured, and the prompt's first gradient."""
    ranks = start_processes()
    shape, changes, rows, steps = ("tiny", {}, 4, 1) if dry else ("8b", {"num_hidden_layers": 4}, 64, 3)
    run = RunConfig(ds_config=f"ds_configs/{case.ds_config}.json", precision=case.precision, prompt_length=20)
    opened = open_random(config_of_shape(shape, **changes), run, ranks, alike=True)
    shards, packed = opened.backbone.shards, []
    for draw in range(steps + 1):
        examples = random_examples(rows, opened.config.vocab_size, 0, draw)[ranks.rank :: ranks.world]
        packed.append(opened.backbone.rows.pack(examples))
    with peak_of(opened.backbone, ranks.device) as peak:
        opened.step(packed[0], 0)
    gradient = opened.engine.state()["exp_avg"]  # of the first step: a tenth of it, clipped
    shards.traffic.reset()
    seconds, _ = timed_steps(lambda number: opened.step(packed[number], number), ranks.device, steps, warm=True)
    median, gathered = statistics.median(seconds), shards.traffic.gathered_bytes / steps
    if ranks.is_main:
        save_file({"gradient": gradient.contiguous()}, file.with_suffix(".safetensors"))
        found = {"world_size": ranks.world, "rows": rows, "step_seconds": median, "gathered_bytes": gathered,
                 "gathered_gb_per_second": gathered / median / 1e9, "peak_bytes": peak.allocated,
                 "reserved_bytes": peak.reserved, "shared_memory": shards.shared and ranks.world > 1}  # fmt: skip
        file.write_text(json.dumps(found), encoding="utf-8")


def try_case(number: int, args: argparse.Namespace, gradients: dict[str, torch.Tensor], record: Record) -> None:
    """Starts a case's ranks and makes a row of what they leave."""
    case, file = CASES[number], args.folder / f"case-{number}.json"
    words = [str(Path(__file__).resolve()), "--worker", str(number), "--folder", str(args.folder)]
    words += ["--dry"] if args.dry else []
    launcher = [sys.executable]
    if case.world > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(case.world)]
    with record.case(case.name):
        file.unlink(missing_ok=True)
        code = run_logged([*launcher, *words], file.with_suffix(".log"), _LIMIT, dict(os.environ))
        if code != 0:
            how = f"was ended behind {_LIMIT:.0f} s" if code is None else f"ended with exit code {code}"
            raise RuntimeError(f"a case's ranks: {how}; see {file.with_suffix('.log').name}")
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        gradient = gradients[case.name] = load_file(file.with_suffix(".safetensors"))["gradient"]
        wanted = gradients[ALONE[case.precision].name]
        apart = float((gradient - wanted).norm() / wanted.norm())
        record.add(case.name, ds_config=case.ds_config, precision=case.precision, difference=apart, bound=case.bound,
                   **found)  # fmt: skip
        if case.bound is not None and not apart <= case.bound:
            raise ValueError(f"the gradient differs from one rank's by {apart:.1e}, more than {case.bound:.0e}")


def main() -> int:
    prepare_environment()
    parser = part_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the cases' ranks leave what they measure")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return run_command(lambda: work(CASES[args.worker], args.dry, args.folder / f"case-{args.worker}.json"))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that no rank outlives this
    args.folder.mkdir(parents=True, exist_ok=True)
    record, gpus = Record(args.json), torch.cuda.device_count()
    gradients: dict[str, torch.Tensor] = {}
    for number, case in enumerate(CASES):
        if case.cuda_alone and not gpus:
            record.absent(case.name, NOT_ON_A_CPU)
        elif gpus and case.world > gpus:
            record.absent(case.name, f"needs {case.world} GPUs, {gpus} here")
        else:
            try_case(number, args, gradients, record)
    return record.code


if __name__ == "__main__":
    exit_process(main())
