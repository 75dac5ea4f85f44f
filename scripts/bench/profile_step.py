#!/usr/bin/env python
"""Where the time of a train step of ours goes, by operator: the products, attention, and all the rest.

    OMP_WAIT_POLICY=ACTIVE python scripts/bench/profile_step.py --data_dir DATA --precisions fp32 bf16

One step a setting, after a warm-up, under torch's profiler, which makes it some 10 % slower; seconds beside it are the
median of three steps without. floor: see bench_step.py.
"""

import argparse
import statistics
import sys
from typing import Any

from bench_measure import floor_operations, matrix_rates
from bench_sides import Ours, Sides
from bench_step import METHODS, default_data, draw_batches, timed
from torch.profiler import ProfilerActivity, profile

from ptp_ds.choices import PRECISIONS
from ptp_ds.commands.exits import run_command
from ptp_ds.config.run_config import DEFAULT_DS_CONFIG, RunConfig
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.ranks.distributed import prepare_environment, start_processes
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import load_split, tokenise
from ptp_ds.tasks.example import Example

_PARTS = {  # by the operators' names, and the autograd functions around them
    "products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    "attention": ("MergedAttention", "MergedAttentionBackward", "_Dense", "_DenseBackward"),
    "norms": ("FrozenRMSNorm", "FrozenRMSNormBackward"),
    "gated feed-forward": ("GatedSilu", "GatedSiluBackward"),
    "rotary": ("FrozenRotary", "FrozenRotaryBackward"),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--data_dir", default=default_data())
    parser.add_argument("--split", default="train")
    parser.add_argument("--task", default="RTE")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt_lengths", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--methods", nargs="+", default=["pgd"], choices=METHODS)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=PRECISIONS)
    parser.add_argument("--operators", type=int, default=15, help="lines of each table")
    return parser.parse_args()


def parts_of(events: Any) -> dict[str, float]:
    """Seconds of each of _PARTS with all that it calls, and of what is left; products outside of attention."""
    total = sum(event.self_cpu_time_total for event in events) / 1e6
    found = {
        part: sum(event.cpu_time_total for event in events if event.key in names) / 1e6
        for part, names in _PARTS.items()
    }
    return {**found, "everything else": total - sum(found.values())}


def show(ours: Ours, batch: list[Example], method: str, run: RunConfig, title: str, operators: int) -> None:
    """Profiles one step and prints its parts, then its operators."""

    def step() -> float:
        return ours.step(batch, method, run, 0)

    step()
    seconds = statistics.median(timed(step, ours.device)[0] for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = profiled.key_averages()
    work = floor_operations(ours.backbone, method, run.ascent_steps, ours.prefix_inputs, ours.row_tokens)
    floor = work / matrix_rates(ours.backbone, ours.row_tokens, ours.device)["fastest"]
    print(f"\n{title}, {method}, {len(batch)} rows, {ours.row_tokens} tokens a stream: {seconds:.2f} s, "
          f"floor {floor:.2f} s ({floor / seconds:.2f})")  # fmt: skip
    for part, share in parts_of(events).items():
        print(f"  {part:20} {share:7.2f} s")
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:operators]:
        print(f"    {event.key[:60]:60} {event.self_cpu_time_total / 1e6:7.2f} s {event.count:7} calls", flush=True)


def main() -> int:
    prepare_environment()
    args = parse()
    ranks, task = start_processes(), load_task(args.task)
    split = load_split(task, args.split, args.data_dir or None, None)
    for precision in args.precisions:
        run = RunConfig(ds_config=DEFAULT_DS_CONFIG, precision=precision)
        sides = Sides.of(args.model, task, run, ranks, "soft", args.rows)
        examples = tokenise(task, split, sides.tokenizer, 1000, head=sides.plan.kind).examples
        batch = draw_batches(list(examples), args.rows, 1, seed=0)[0]
        for length in args.prompt_lengths:
            ours, _ = sides.open_ours(length)
            for method in args.methods:
                show(ours, batch, method, run, f"{sides.dtype}, prompt {length}", args.operators)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
