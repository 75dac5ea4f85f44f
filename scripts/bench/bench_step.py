#!/usr/bin/env python
"""Times a train step of ours against a plain loop over peft's PromptTuning, on the same rows, in one run.

    python scripts/bench/bench_step.py --data_dir DATA --json bench.json

(a) peft as documented: rows padded on the right, full logits. (b) the best of it: padded on the left and
logits_to_keep=1 (or as many as the longest answer). Both take --peft_rows rows at a time and carry the same
regulariser: clean pass, K ascent passes for delta's gradient, perturbed pass, one backward, AdamW step; free is timed
against one perturbed pass. --prompt deep is timed against peft's PrefixTuning, an encoder with its trained classifier
against peft's SEQ_CLS (both sides are then the same). Each batch is timed by every side in every one of --precisions,
in turn. A ratio is the median over batches of peft / ours: of the same precision, of (b) in fp32 (b32/o), of peft's
fastest side in any precision (fast/o); o/b32,0 is ours / (b) in fp32 without regulariser. floor: the least time of the
step's matrix products, 4 N T floating-point operations for each pass with gradient over T real tokens, the prompt's
once a step, at the matrix rate of the precision, measured in the same run: that of the fastest products here; torch's:
that of torch's own, which peft runs on.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
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
from ptp_ds.choices import IMPLS, PRECISIONS
from ptp_ds.commands.exits import run_command
from ptp_ds.config.run_config import DEFAULT_DS_CONFIG, RunConfig
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.models.positions import row_room
from ptp_ds.ranks.distributed import exit_process, prepare_environment, start_processes
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


@dataclass
class Bench:
    """Both sides in one precision. plain_keep: (b)'s seconds without regulariser, batch by batch, from method none."""

    precision: str
    sides: Sides
    ours: Ours
    peft: dict[str, PeftLoop]
    start: Tensor
    plain_keep: list[float] = field(default_factory=list)
    times: Timings = field(default_factory=Timings)
    floors: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    peak: int = 0

    def begin(self, batch: list[Example], method: str, run: RunConfig) -> None:
        """Warms a method up, and starts all sides from the same prompt."""
        self.times, self.floors = Timings(), {"torch": [], "fastest": []}
        self.tokens = {"ours": 0, "peft": 0}
        self.peak = self.ours.peak_bytes(batch, method, run)
        self.ours.engine.set_prompt(self.start)
        for loop in self.peft.values():
            loop.start(self.start)

    def time(self, batch: list[Example], method: str, run: RunConfig, number: int) -> None:
        """One step of each side."""
        ours, device = self.ours, self.ours.device
        ours.backbone.shards.traffic.reset()
        seconds, loss = timed(lambda: ours.step(batch, method, run, number), device)
        self.times.ours.append(seconds)
        work = floor_operations(ours.backbone, method, run.ascent_steps, ours.prefix_inputs, ours.row_tokens)
        for name, rate in matrix_rates(ours.backbone, ours.row_tokens, device).items():
            self.floors[name].append(work / rate / seconds)
        for name, loop in self.peft.items():
            seconds, value = timed(lambda loop=loop: loop.step(batch, method, run, ours.unit), device)
            getattr(self.times, name).append(seconds)
            self.tokens["peft"] += loop.tokens // len(self.peft)
            if number == 0 and method == "none" and (name == "peft" or loop.classes):
                check_same_loss(loss, value, self.sides.dtype)
        self.tokens["ours"] += ours.tokens
        if method == "none":
            self.plain_keep = list(self.times.peft_keep)

    def row(self, setting: dict[str, Any], batches: int) -> dict[str, Any]:
        """What was measured since `begin`."""
        times = self.times
        return {
            **setting, "dtype": self.sides.dtype, "ours_seconds": times.median("ours"),
            "peft_seconds": times.median("peft"), "peft_keep_seconds": times.median("peft_keep"),
            "ratio_peft": times.ratio("peft"), "ratio_peft_keep": times.ratio("peft_keep"),
            "floor_share": statistics.median(self.floors["fastest"]),
            "floor_share_torch": statistics.median(self.floors["torch"]), "peak_bytes": self.peak,
            **self.ours.traffic(), "tokens_ours": self.tokens["ours"] // batches,
            "tokens_peft": self.tokens["peft"] // batches,
        }  # fmt: skip


def measure(setting: dict[str, Any], batches: list[list[Example]], benches: Sequence[Bench], run: RunConfig) -> list:
    """A row of the table for each precision; with several precisions, and peft, two ratios more (see `compare`).

    The last batch warms up and isn't timed: every timed step has rows that no step of ours had before.
    """
    method, (*batches, first) = setting["method"], batches
    for bench in benches:
        bench.begin(first, method, run)
    for number, batch in enumerate(batches):
        for bench in benches:
            bench.time(batch, method, run, number)
    rows = [bench.row(setting, len(batches)) for bench in benches]
    compare(rows, benches)
    return rows


def compare(rows: list[dict[str, Any]], benches: Sequence[Bench]) -> None:
    """Adds each precision's ratio to peft's (b) in fp32, to peft's fastest, and ours / (b) in fp32 without regulariser.

    fp32: the first precision where fp32 isn't timed.
    """
    first = next((bench for bench in benches if bench.precision == "fp32"), benches[0])
    theirs = [getattr(bench.times, side) for bench in benches for side in bench.peft]
    for row, bench in zip(rows, benches, strict=True):
        ours = bench.times.ours
        if first.times.peft_keep:
            pairs = zip(first.times.peft_keep, ours, strict=True)
            row["ratio_peft_keep_fp32"] = statistics.median(b / mine for b, mine in pairs)
        if theirs:
            fastest = (min(seconds) for seconds in zip(*theirs, strict=True))
            row["ratio_fastest"] = statistics.median(best / mine for best, mine in zip(fastest, ours, strict=True))
        if first.plain_keep:
            shares = [mine / plain for mine, plain in zip(ours, first.plain_keep, strict=True)]
            row["share_of_peft_keep_without_regulariser"] = statistics.median(shares)


def check_same_loss(ours: float, theirs: float, dtype: str) -> None:
    """Both sides must have done the same work: the first clean losses agree."""
    bound = (1e-3 if dtype == "float32" else 5e-2) * max(1.0, abs(theirs))
    if abs(ours - theirs) > bound:
        raise ValueError(
            f"Our clean loss {ours} and peft's {theirs} differ; the benchmark would compare different work."
        )


def filled(examples: list[Example], prompt_length: int, number: int) -> list[Example]:
    """Examples for about 4096 packed tokens in two streams, others for each `number`."""
    chosen: list[Example] = []
    for example in draw_batches(examples, len(examples), number + 1, seed=0)[number]:
        if prompt_length + 2 * sum(one.packed_length for one in chosen) >= 4096:
            break
        chosen.append(example)
    return chosen


def compare_activations(ours: Ours, examples: list[Example], run: RunConfig, prompt_length: int) -> list[dict]:
    """keep and recompute on gaussian steps of about 4096 packed tokens, in turn: peak bytes and median seconds."""
    drawn = [filled(examples, prompt_length, number) for number in range(4)]
    rows: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {"keep": [], "recompute": []}
    for turn in range(4):
        for mode, timings in seconds.items():
            ours.backbone.activations = Activations(mode)
            if turn == 0:  # warms up as well
                peak = ours.peak_bytes(drawn[0], "gaussian", run)
                rows[mode] = {"activations": mode, "packed_tokens": ours.tokens, "peak_bytes": peak}
            else:
                rows_of_turn = drawn[turn]
                timings.append(timed(lambda rows=rows_of_turn: ours.step(rows, "gaussian", run, 0), ours.device)[0])
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


HEADER = ("task   rows prompt method    precision     ours   peft a   peft b a/ours b/ours  b32/o fast/o o/b32,0  floor"
          " torch's peak MiB gathers  peak w  tokens  peft's")  # fmt: skip
_RATIOS = ("ratio_peft", "ratio_peft_keep", "ratio_peft_keep_fp32", "ratio_fastest",
           "share_of_peft_keep_without_regulariser", "floor_share", "floor_share_torch")  # fmt: skip


def print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['task']:6} {row['rows']:4} {row['prompt_length']:5} {row['method']:9} {row['dtype']:9}"
        + "".join(shown(row[name], 9) for name in ("ours_seconds", "peft_seconds", "peft_keep_seconds"))
        + "".join(shown(row.get(name), 7) for name in _RATIOS)
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
        "--data_dir",
        default=default_data(),
        help='folder with <Task>/train.jsonl (default: %(default)s), "" for the demo data',
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
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=PRECISIONS, help="of both sides")
    parser.add_argument("--kernels", default="auto", choices=IMPLS, help="of our side")
    parser.add_argument("--joint", action=argparse.BooleanOptionalAction,
                        help="whether our frozen products of one input are one (default: on a GPU)")  # fmt: skip
    parser.add_argument("--ds_config", default=DEFAULT_DS_CONFIG)
    parser.add_argument("--json", help="write one row a setting to this file")
    return parser.parse_args()


def run_of(args: argparse.Namespace, precision: str) -> RunConfig:
    """The settings of both sides' steps."""
    return RunConfig(ds_config=args.ds_config, precision=precision, kernels=args.kernels)


def open_bench(args: argparse.Namespace, length: int, precision: str, sides: Sides) -> Bench:
    """Both sides in one precision, with one prompt."""
    ours, prompt = sides.open_ours(length)
    print(f"frozen products of ours, {sides.dtype}, prompt {length}: {ours.backbone.joined}")
    peft = {SIDES[side]: sides.open_peft(prompt, ours.backbone.head, side == "b") for side in sorted(args.against)}
    return Bench(precision, sides, ours, peft, prompt)


def bench_length(args: argparse.Namespace, length: int, of_precision: dict[str, Sides]) -> list[dict[str, Any]]:
    """The table's rows for one prompt length."""
    benches = [open_bench(args, length, precision, sides) for precision, sides in of_precision.items()]
    first, run, table = benches[0], run_of(args, benches[0].precision), []
    backbone = first.ours.backbone
    for name in args.tasks:
        task = load_task(name)
        split = load_split(task, args.split, args.data_dir or None, None)
        room = min(2048, row_room(None, length, backbone.model.config)) - backbone.rows.extra_tokens
        examples = list(tokenise(task, split, first.sides.tokenizer, room, head=first.sides.plan.kind).examples)
        for rows in args.rows:
            batches = draw_batches(examples, rows, args.pairs + 1, seed=0)
            for bench in benches:
                for loop in bench.peft.values():  # warm-up, on a batch that isn't timed
                    loop.step(batches[-1], "none", run, bench.ours.unit)
                bench.plain_keep = []
            for method in args.methods:
                setting = {"task": name, "rows": rows, "prompt_length": length, "method": method}
                table += measure(setting, batches, benches, run)
                for row in table[-len(benches) :]:
                    print_row(row)
        if args.activations:
            for bench in benches:
                setting = {"task": name, "prompt_length": length, "method": "gaussian", "dtype": bench.sides.dtype}
                rows_of = compare_activations(bench.ours, examples, run, length)
                table += [{**setting, **row} for row in rows_of]
    return table


def main() -> int:
    prepare_environment()
    args = parse()
    ranks = start_processes()
    task = load_task(args.tasks[0])
    of_precision = {
        precision: Sides.of(args.model, task, run_of(args, precision), ranks, args.prompt, args.peft_rows, args.joint)
        for precision in args.precisions
    }
    dtypes = ", ".join(sides.dtype for sides in of_precision.values())
    print(f"{args.model} {dtypes} on {ranks.device.type}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY "
          f"{os.environ.get('OMP_WAIT_POLICY', 'unset')}; seconds are medians of "
          f"{args.pairs} batches, ratios medians of pairs; rows from {args.data_dir or 'the packaged demo data'}; "
          f"{json.dumps(versions())}")  # fmt: skip
    for sides in of_precision.values():
        print(f"frozen products of ours, {sides.dtype}: "
              f"{explain_product(args.kernels, ranks.device, sides.resolved.dtype)}")  # fmt: skip
    print(HEADER)
    table = [row for length in args.prompt_lengths for row in bench_length(args, length, of_precision)]
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    exit_process(run_command(main))
