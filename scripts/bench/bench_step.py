#!/usr/bin/env python
"""Times a train step of ours against a plain loop over peft's PromptTuning, on the same rows, in one run.

    python scripts/bench/bench_step.py --data_dir DATA --json bench.json

(a) peft as documented: rows padded on the right, full logits. (b) the best of it: padded on the left and
logits_to_keep=1 (or as many as the longest answer). Both take --peft_rows rows at a time and carry the same
regulariser: clean pass, K ascent passes for delta's gradient, perturbed pass, one backward, AdamW step; free is timed
against one perturbed pass. --prompt deep is timed against peft's PrefixTuning, an encoder with its trained classifier
against peft's SEQ_CLS (both sides are then the same). A ratio is the median over batches of peft / ours. floor: the
least time of the step's matrix products, 4 N T floating-point operations for each pass with gradient over T real
tokens, the prompt's once a step, at the matrix rate measured in the same run: that of the fastest products here;
torch's: that of torch's own, which peft runs on.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_measure import floor_operations, matrix_rates, wait
from bench_sides import Ours, Sides
from peft_loop import PeftLoop
from torch import Tensor

from ptp_ds.adapters.record import versions
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.frozen_linear import explain_product
from ptp_ds.commands.exits import report_error
from ptp_ds.config.run_config import DEFAULT_DS_CONFIG, RunConfig
from ptp_ds.errors import UserError
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.kernels import IMPLS
from ptp_ds.models.positions import row_room
from ptp_ds.precision import PRECISIONS
from ptp_ds.ranks.distributed import prepare_environment, start_processes, stop_processes
from ptp_ds.seeding import make_generator
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import load_split, tokenise
from ptp_ds.tasks.example import Example

METHODS = ("none", "gaussian", "free", "pgd")
SIDES = {"a": "peft", "b": "peft_keep"}


@dataclass
class Timings:
    """Seconds of each side, batch by batch, in the same order."""

    ours: list[float] = field(default_factory=list)
    peft: list[float] = field(default_factory=list)
    peft_keep: list[float] = field(default_factory=list)

    def median(self, side: str) -> float | None:
        """Median seconds; None for a side that wasn't timed."""
        return statistics.median(getattr(self, side)) if getattr(self, side) else None

    def ratio(self, side: str) -> float | None:
        """Median of side / ours over the batches."""
        pairs = list(zip(getattr(self, side), self.ours, strict=False))
        return statistics.median(theirs / ours for theirs, ours in pairs) if pairs else None


def timed(call: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """(seconds, the call's value), waiting for the device at both ends."""
    wait(device)
    start = time.perf_counter()
    value = call()
    wait(device)
    return time.perf_counter() - start, value


def draw_batches(examples: list[Example], rows: int, count: int, seed: int) -> list[list[Example]]:
    """Seeded batches of `rows` examples without replacement, as many as asked for (reshuffled when used up)."""
    batches: list[list[Example]] = []
    epoch = 0
    while len(batches) < count:
        order = torch.randperm(len(examples), generator=make_generator(seed, "bench", epoch)).tolist()
        batches += [[examples[i] for i in order[j : j + rows]] for j in range(0, len(order) - rows + 1, rows)]
        epoch += 1
    return batches[:count]


def measure(setting: dict[str, Any], batches: list[list[Example]], ours: Ours, peft: dict[str, PeftLoop],
            run: RunConfig, plain_keep: list[float], start: Tensor) -> dict[str, Any]:  # fmt: skip
    """One row of the table. plain_keep: (b)'s seconds without regulariser, batch by batch; filled by method none."""
    method, device = setting["method"], ours.device
    times, tokens = Timings(), {"ours": 0, "peft": 0}
    floors: dict[str, list[float]] = {"torch": [], "fastest": []}
    peak = ours.peak_bytes(batches[0], method, run)
    ours.engine.set_prompt(start)
    for loop in peft.values():
        loop.start(start)
    for number, batch in enumerate(batches):
        ours.backbone.shards.traffic.reset()
        seconds, loss = timed(lambda batch=batch, number=number: ours.step(batch, method, run, number), device)
        times.ours.append(seconds)
        work = floor_operations(ours.backbone, method, run.ascent_steps, ours.prefix_inputs, ours.row_tokens)
        for name, rate in matrix_rates(ours.backbone, ours.row_tokens, device).items():
            floors[name].append(work / rate / seconds)
        for name, loop in peft.items():
            seconds, value = timed(lambda batch=batch, loop=loop: loop.step(batch, method, run, ours.unit), device)
            getattr(times, name).append(seconds)
            tokens["peft"] = tokens["peft"] + loop.tokens // len(peft)
            if number == 0 and method == "none" and (name == "peft" or loop.classes):
                check_same_loss(loss, value, setting["dtype"])
        tokens["ours"] += ours.tokens
    if method == "none":
        plain_keep.extend(times.peft_keep)
    row = {
        **setting, "ours_seconds": times.median("ours"), "peft_seconds": times.median("peft"),
        "peft_keep_seconds": times.median("peft_keep"), "ratio_peft": times.ratio("peft"),
        "ratio_peft_keep": times.ratio("peft_keep"), "floor_share": statistics.median(floors["fastest"]),
        "floor_share_torch": statistics.median(floors["torch"]), "peak_bytes": peak,
        **ours.traffic(), "tokens_ours": tokens["ours"] // len(batches), "tokens_peft": tokens["peft"] // len(batches),
    }  # fmt: skip
    if plain_keep:
        shares = [mine / plain for mine, plain in zip(times.ours, plain_keep, strict=True)]
        row["share_of_peft_keep_without_regulariser"] = statistics.median(shares)
    return row


def check_same_loss(ours: float, theirs: float, dtype: str) -> None:
    """Both sides must have done the same work: the first clean losses agree."""
    bound = (1e-3 if dtype == "float32" else 5e-2) * max(1.0, abs(theirs))
    if abs(ours - theirs) > bound:
        raise ValueError(
            f"Our clean loss {ours} and peft's {theirs} differ; the benchmark would compare different work."
        )


def compare_activations(ours: Ours, examples: list[Example], run: RunConfig, prompt_length: int) -> list[dict]:
    """keep and recompute on one gaussian step of about 4096 packed tokens, in turn: peak bytes and median seconds."""
    chosen: list[Example] = []
    while prompt_length + 2 * sum(example.packed_length for example in chosen) < 4096 and len(chosen) < len(examples):
        chosen.append(examples[len(chosen)])
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {"keep": [], "recompute": []}
    for turn in range(4):
        for mode, timings in seconds.items():
            ours.backbone.activations = Activations(mode)
            if turn == 0:  # warms up as well
                peak = ours.peak_bytes(chosen, "gaussian", run)
                rows[mode] = {"activations": mode, "packed_tokens": ours.tokens, "peak_bytes": peak}
            else:
                timings.append(timed(lambda: ours.step(chosen, "gaussian", run, 0), ours.device)[0])
    ours.backbone.activations = Activations()
    for mode, row in rows.items():
        row["seconds"] = statistics.median(seconds[mode])
        row["time_ratio"] = statistics.median(a / b for a, b in zip(seconds[mode], seconds["keep"], strict=True))
        row["peak_ratio"] = row["peak_bytes"] / rows["keep"]["peak_bytes"]
        peak = row["peak_bytes"] / 2**20
        print(f"{mode:10} {row['packed_tokens']} packed tokens: peak {peak:.0f} MiB "
              f"({row['peak_ratio']:.2f} of keep), {row['seconds']:.2f} s ({row['time_ratio']:.2f})")  # fmt: skip
    return list(rows.values())


def shown(value: float | None, width: int, digits: int = 2) -> str:
    """A number in a column, a dash where there is none."""
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def print_row(row: dict[str, Any]) -> None:
    share = row.get("share_of_peft_keep_without_regulariser")
    print(
        f"{row['task']:6} {row['rows']:4} {row['prompt_length']:5} {row['method']:9}"
        + "".join(shown(row[name], 9) for name in ("ours_seconds", "peft_seconds", "peft_keep_seconds"))
        + "".join(shown(value, 7) for value in (row["ratio_peft"], row["ratio_peft_keep"], share))
        + "".join(shown(row[name], 7) for name in ("floor_share", "floor_share_torch"))
        + f" {row['peak_bytes'] / 2**20:8.0f} {row['gathers_per_layer']:7} {row['peak_gathered_share']:7.2f}"
        + f" {row['tokens_ours']:7} {row['tokens_peft']:7}",
        flush=True,
    )


def default_data() -> str | None:
    """The developers' copy of SuperGLUE beside the checkout where there is one, else None: the packaged demo data."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "superglue"
    return str(folder) if folder.is_dir() else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument(
        "--data_dir", default=default_data(), help="folder with <Task>/train.jsonl (default: %(default)s)"
    )
    parser.add_argument("--split", default="train")
    parser.add_argument("--tasks", nargs="+", default=["RTE"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--prompt_lengths", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--against", nargs="*", default=["a", "b"], choices=tuple(SIDES), help="peft's sides to time")
    parser.add_argument("--prompt", default="soft", choices=("soft", "deep"))
    parser.add_argument(
        "--peft_rows", type=int, default=16, help="examples of peft's micro-batch: what its memory holds"
    )
    parser.add_argument("--pairs", type=int, default=3, help="batches timed for each setting")
    parser.add_argument("--activations", action="store_true", help="also compare kept and recomputed activations")
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--kernels", default="auto", choices=IMPLS, help="of our side")
    parser.add_argument("--ds_config", default=DEFAULT_DS_CONFIG)
    parser.add_argument("--json", help="write one row a setting to this file")
    return parser.parse_args()


def run_of(args: argparse.Namespace) -> RunConfig:
    """The settings of both sides' steps."""
    return RunConfig(ds_config=args.ds_config, precision=args.precision, kernels=args.kernels)


def bench_length(args: argparse.Namespace, length: int, sides: Sides) -> list[dict[str, Any]]:
    """The table's rows for one prompt length."""
    ours, prompt = sides.open_ours(length)
    peft = {SIDES[side]: sides.open_peft(prompt, ours.backbone.head, side == "b") for side in sorted(args.against)}
    tokenizer, dtype = sides.tokenizer, sides.dtype
    run, table = run_of(args), []
    for name in args.tasks:
        task = load_task(name)
        split = load_split(task, args.split, args.data_dir, None)
        room = min(2048, row_room(None, length, ours.backbone.model.config)) - ours.backbone.rows.extra_tokens
        examples = list(tokenise(task, split, tokenizer, room).examples)
        for rows in args.rows:
            batches = draw_batches(examples, rows, args.pairs + 1, seed=0)
            for loop in peft.values():  # warm-up, on a batch that isn't timed
                loop.step(batches[-1], "none", run, ours.unit)
            plain_keep: list[float] = []
            for method in args.methods:
                setting = {"task": name, "rows": rows, "prompt_length": length, "method": method, "dtype": dtype}
                table.append(measure(setting, batches[:-1], ours, peft, run, plain_keep, prompt))
                print_row(table[-1])
        if args.activations:
            setting = {"task": name, "prompt_length": length, "method": "gaussian", "dtype": dtype}
            table += [{**setting, **row} for row in compare_activations(ours, examples, run, length)]
    return table


def main() -> int:
    prepare_environment()
    args = parse()
    ranks = start_processes()
    run = run_of(args)
    sides = Sides.of(args.model, load_task(args.tasks[0]), run, ranks, args.prompt, args.peft_rows)
    print(f"{args.model} {sides.dtype} on {ranks.device.type}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY "
          f"{os.environ.get('OMP_WAIT_POLICY', 'unset')}; seconds are medians of "
          f"{args.pairs} batches, ratios medians of pairs; rows from {args.data_dir or 'the packaged demo data'}; "
          f"{json.dumps(versions())}")  # fmt: skip
    print(f"frozen products of ours: {explain_product(args.kernels, ranks.device, sides.resolved.dtype)}")
    print("task   rows prompt method        ours   peft a   peft b a/ours b/ours ours/b0  floor torch's peak MiB "
          "gathers  peak w  tokens  peft's")  # fmt: skip
    table = [row for length in args.prompt_lengths for row in bench_length(args, length, sides)]
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    stop_processes()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(report_error(error))
