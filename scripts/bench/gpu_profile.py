#!/usr/bin/env python
"""A train step's time by kinds of kernels, and the time that the device has nothing to do, by torch's profiler.

Shares are of the step as it is without a profiler. gap: that step less the union of the kernels' times, in which the
device waits for launches. On a CPU launching and working are one: there is no gap, operators stand for kernels, and
shares are of their time.
"""

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench_measure import wait
from bench_random import Opened, config_of_shape, open_random, timed_steps
from gpu_record import NOT_ON_A_CPU, Record, part_parser
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ptp_ds.commands.exits import run_command
from ptp_ds.config.run_config import RunConfig
from ptp_ds.ranks.distributed import exit_process, prepare_environment, start_processes

_KINDS = (  # the first that a kernel's or an operator's name matches; norms, activations and reductions are left
    ("communication", r"nccl|c10d::"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("product", r"gemm|cutlass|nvjet|cublas|splitk|xmma|aten::(addmm|mm|bmm|baddbmm)$|mkldnn::_linear"),
    ("copies", r"memcpy|memset|copy|catarray|gather|scatter|indexselect|index_elementwise|indexing|index_kernel|"
               r"aten::(cat|clone|index|index_select|zero_|fill_)"),
)  # fmt: skip
KINDS = (*(kind for kind, _ in _KINDS), "elementwise")


@dataclass(frozen=True)
class Work:
    """One kernel: start, end and its own time, in microseconds."""

    name: str
    start: float
    end: float
    own: float


def kind_of(name: str) -> str:
    """The kind of a kernel's or an operator's name."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), "elementwise")


def busy_of(works: Sequence[Work]) -> float:
    """Microseconds in which at least one of them runs."""
    total, end = 0.0, float("-inf")
    for work in sorted(works, key=lambda work: work.start):
        total += max(0.0, work.end - max(end, work.start))
        end = max(end, work.end)
    return total


def works_of(events: Any, cuda: bool) -> list[Work]:
    """Kernels and copies of the device; on a CPU operators, without those that they call in their own time."""
    wanted, found = DeviceType.CUDA if cuda else DeviceType.CPU, []
    for event in events:
        if event.device_type != wanted or event.is_user_annotation or not (cuda or "::" in event.name):
            continue
        start, end = event.time_range.start, event.time_range.end
        found.append(Work(event.name, start, end, end - start if cuda else event.self_cpu_time_total))
    return found


def profile_step(opened: Opened, run: RunConfig, rows: int, steps: int) -> dict[str, Any]:
    """Shares of a step's time by kind; every step has rows of its own."""
    device, packed = opened.ranks.device, opened.rows(rows, steps + 2)
    cuda = device.type == "cuda"
    seconds, _ = timed_steps(lambda number: opened.loss(packed[number], number, run), device, steps)
    step = statistics.median(seconds)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiled:
        opened.loss(packed[-1], steps + 1, run)
        wait(device)
    works = works_of(profiled.events(), cuda)
    busy, by_kind, by_name = busy_of(works) / 1e6, Counter(dict.fromkeys(KINDS, 0.0)), Counter[str]()
    for work in works:
        by_kind[kind_of(work.name)] += work.own / 1e6
        by_name[work.name[:80]] += work.own / 1e6
    whole = step if cuda else sum(by_kind.values())
    return {
        "step_seconds": step, "busy_seconds": busy, "gap_share": 1 - busy / step if cuda else None,
        **{kind: total / whole for kind, total in by_kind.items()}, "kernels": len(works),
        "longest": {name: total / whole for name, total in by_name.most_common(12)},
    }  # fmt: skip


def main() -> int:
    prepare_environment()
    args = part_parser(__doc__).parse_args()
    ranks, record = start_processes(), Record(args.json)
    if ranks.device.type != "cuda":
        record.absent("gaps between launches", NOT_ON_A_CPU)
    shapes = [("tiny", {}, [4])] if args.dry else [("smollm2", {}, [16, 160]), ("8b", {"num_hidden_layers": 8}, [160])]
    for shape, changes, batches in shapes:
        with record.case(shape):
            opened = open_random(config_of_shape(shape, **changes), RunConfig(prompt_length=100), ranks)
            for rows in batches:
                for method in ("gaussian", "pgd"):
                    case = f"{shape}, {method}, {rows} rows"
                    with record.case(case):
                        run = replace(opened.run, perturbation=method)
                        record.add(case, **profile_step(opened, run, rows, 1 if args.dry else 3))
    return record.code


if __name__ == "__main__":
    exit_process(run_command(main))
