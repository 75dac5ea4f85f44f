#!/usr/bin/env python
"""One train step of a large random Llama: time, MFU, memory, and peft's on the same batch; no weights needed.

    python scripts/bench/bench_large.py --shape 8b --json large.json

The weights are random, so the scores mean nothing; shapes and dtype are the real ones. --shape tiny runs anywhere.
Every timed step has rows that no step had before. mfu: 4 N T operations a pass with gradient over the step's time, over
the card's own figure for half precision; rate_share: over the rate of the layers' products, measured in the same run.
peft's loop (PromptTuning, logits_to_keep) takes the same batch, --peft_rows rows at a time since it keeps every
activation, or half of that, and so on, until it fits; its MFU counts the tokens that it pads with. planned_bytes:
ptp_ds.planning's figure for peak_bytes.
"""

import argparse
import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from bench_measure import card_rate, floor_operations, matrices_of, matrix_rates, peak_of
from bench_random import SHAPES, Opened, config_of_shape, open_random, random_examples, timed_steps
from gpu_record import NOT_ON_A_CPU, Record
from peft_loop import PeftLoop
from transformers import AutoModelForCausalLM

from ptp_ds.backbone.backbone import decoder_layers
from ptp_ds.choices import PRECISIONS
from ptp_ds.commands.exits import run_command
from ptp_ds.config.run_config import DEFAULT_DS_CONFIG, RunConfig
from ptp_ds.ranks.distributed import Ranks, exit_process, prepare_environment, start_processes

METHODS = ("none", "gaussian", "pgd")


def share_of(work: float, seconds: float, rate: float | None) -> float | None:
    """Operations over time over a rate; None where the rate isn't known."""
    return None if rate is None else work / seconds / rate


def require_finite(losses: list[float]) -> None:
    """ValueError where a timed step's loss isn't finite."""
    for number, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise ValueError(f"The loss of step {number + 1} is {loss}; the benchmark's step is broken.")


def measure(opened: Opened, run: RunConfig, rows: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step, tokens per second over all ranks, this rank's memory, and its share of two rates."""
    ranks, backbone = opened.ranks, opened.backbone
    opened.engine.set_prompt(opened.start)
    depth = run.schedule == "depth"
    packed: list[Any] = (
        opened.parted(rows, steps + 1, run.gradient_accumulation_steps) if depth else opened.rows(rows, steps + 1)
    )
    held = [sum(one.num_tokens for one in row) if depth else row.num_tokens for row in packed]
    with peak_of(backbone, ranks.device) as peak:  # warms up, too
        tokens = opened.step(packed[0], 0, run)[1]
    planned = opened.planned(run, tokens - opened.start.shape[0])
    seconds, values = timed_steps(
        lambda number: opened.step(packed[number], number, run), ranks.device, steps, warm=True
    )
    require_finite([loss for loss, _ in values])
    median, counts = statistics.median(seconds), [count for _, count in values]
    work = statistics.mean(
        floor_operations(backbone, run.perturbation, run.ascent_steps, opened.start.shape[0], count)
        for count in held[1:]
    )
    rate = matrix_rates(backbone, min(held[0], 8192), ranks.device)["fastest"]
    return {
        "step_seconds": median, "tokens": statistics.mean(counts) * ranks.world,
        "tokens_per_second": ranks.world * sum(counts) / sum(seconds), "mfu": share_of(work, median,
        card_rate(ranks.device)), "rate_share": share_of(work, median, rate), "peak_bytes": peak.allocated,
        "reserved_bytes": peak.reserved, "planned_bytes": planned.total,
        "peak_over_plan": peak.allocated / planned.total,
    }  # fmt: skip


def open_peft(opened: Opened, peft_rows: int) -> PeftLoop:
    """peft's side of the same shape, with random weights of its own."""
    device = opened.ranks.device
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(
            copy.deepcopy(opened.config), dtype=opened.resolved.dtype, attn_implementation="sdpa"
        )
    return PeftLoop(base, opened.start, device, True, peft_rows, opened.backbone.head, "soft")


def fit_rows(loop: PeftLoop, step: Callable[[], Any]) -> None:
    """Halves peft's micro-batch until its step fits into the memory."""
    while True:
        try:
            step()
            return
        except torch.OutOfMemoryError:
            if loop.micro_batch == 1:
                raise
        loop.micro_batch //= 2
        loop.optimizer.zero_grad()
        torch.cuda.empty_cache()


def measure_peft(opened: Opened, loop: PeftLoop, run: RunConfig, rows: int, steps: int) -> dict[str, Any]:
    """Median seconds of peft's step on batches of the same size, and its MFU over all tokens that it computes."""
    device, vocabulary = opened.ranks.device, opened.config.vocab_size
    batches = [random_examples(rows, vocabulary, 0, draw + 1) for draw in range(steps + 1)]

    def step(number: int) -> tuple[float, int]:
        return loop.step(batches[number], run.perturbation, run, opened.unit), loop.tokens

    fit_rows(loop, lambda: step(0))  # warms up, too
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, values = timed_steps(step, device, steps, warm=True)
    require_finite([loss for loss, _ in values])
    passes, streams = {"none": (1, 1), "gaussian": (2, 2), "pgd": (run.ascent_steps + 2, 2)}[run.perturbation]
    counted = passes / streams * statistics.mean(tokens for _, tokens in values)
    work = 4.0 * sum(a * b for a, b in matrices_of(opened.backbone)) * counted
    median = statistics.median(seconds)
    return {"peft_rows": loop.micro_batch, "peft_seconds": median, "peft_tokens": counted,
            "peft_mfu": share_of(work, median, card_rate(device)),
            "peft_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="8b", choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--rows", type=int, nargs="+", default=[32], help="rows on each rank, a setting each")
    parser.add_argument("--peft_rows", type=int, default=16, help="of peft's micro-batch; 0: ours alone")
    parser.add_argument("--prompt_length", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ds_config", default=DEFAULT_DS_CONFIG)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def bench(args: argparse.Namespace, ranks: Ranks, record: Record) -> None:
    """Ours, setting by setting, then peft's beside it: it holds a second model, which our peak must not count."""
    changes = {"num_hidden_layers": args.layers} if args.layers else {}
    run = RunConfig(ds_config=args.ds_config, precision=args.precision, prompt_length=args.prompt_length)
    opened = open_random(config_of_shape(args.shape, **changes), run, ranks)
    about = {"shape": args.shape, "layers": len(decoder_layers(opened.backbone.model)), "dtype": opened.dtype,
             "prompt_length": args.prompt_length, "world_size": ranks.world,
             "activations": opened.backbone.activations.describe()}  # fmt: skip
    record.add("opened", shape=args.shape, seconds=opened.seconds)
    ours: dict[tuple[str, int], float] = {}
    for method, rows in product(args.methods, args.rows):
        case = f"{method}, {rows} rows"
        with record.case(case):
            found = measure(opened, replace(run, perturbation=method), rows, args.steps)
            ours[method, rows] = found["step_seconds"]
            record.add(case, **about, method=method, rows=rows * ranks.world, **found)
    if ranks.world > 1 or not args.peft_rows or not ours:
        return
    loop = open_peft(opened, args.peft_rows)
    for (method, rows), seconds in ours.items():
        case = f"peft, {method}, {rows} rows"
        with record.case(case):
            theirs = measure_peft(opened, loop, replace(run, perturbation=method), rows, args.steps)
            record.add(case, shape=args.shape, method=method, rows=rows, **theirs,
                       ratio_peft_keep=theirs["peft_seconds"] / seconds)  # fmt: skip


def main() -> int:
    prepare_environment()
    args = parse()
    ranks = start_processes()
    record = Record(args.json if ranks.is_main else None, ranks.is_main)
    if card_rate(ranks.device) is None:
        known = torch.cuda.get_device_name() if ranks.device.type == "cuda" else NOT_ON_A_CPU
        record.absent("mfu", f"{known}: no figure to hold it against; rate_share stands for it")
    with record.case("all"):
        bench(args, ranks, record)
    return record.code


if __name__ == "__main__":
    exit_process(run_command(main))
