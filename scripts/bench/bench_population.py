#!/usr/bin/env python
"""Times a step of several prompts against a step of one, on rows of equal length, and counts gathers.

    python scripts/bench/bench_population.py
    torchrun --standalone --nproc_per_node 2 scripts/bench/bench_population.py --json population.json

Each round times every number of members in turn; a ratio is the median over rounds of many / one. times: how much more
work of one member a second does. gathers: of a layer, in a step.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from bench_measure import wait

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.commands.exits import run_command
from ptp_ds.commands.one_run import prepare
from ptp_ds.config.run_config import RunConfig
from ptp_ds.files import write_json
from ptp_ds.perturb import Noise
from ptp_ds.prompts import empty_prompts
from ptp_ds.ranks.distributed import Ranks, prepare_environment, start_processes
from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example
from ptp_ds.training.engine import Engine
from ptp_ds.training.member_adamw import MemberRate
from ptp_ds.training.population_engine import PopulationEngine
from ptp_ds.training.population_step import MemberStep, population_loss, population_row
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.start import open_backbone
from ptp_ds.training.step import optimizer_step, settings_of


@dataclass
class Side:
    """`count` prompts: an Engine for one, a PopulationEngine for more. seconds, gathers: of each step."""

    count: int
    engine: Engine
    seconds: list[float] = field(default_factory=list)
    gathers: list[float] = field(default_factory=list)


def open_side(count: int, prepared: Prepared, backbone: Backbone, ranks: Ranks) -> Side:
    run, config = prepared.run, prepared.source.config
    weight, _ = empty_prompts(run.prompt, config, [run.prompt_length] * count, [None] * count)
    if count == 1:
        engine = Engine(weight, backbone, prepared.resolved, ranks)
    else:
        engine = PopulationEngine(weight, backbone, prepared.resolved, ranks, [run.prompt_length] * count)
    generator = make_generator(0, "bench")
    engine.set_prompt(0.1 * torch.randn(count * run.prompt_length, backbone.width, generator=generator))
    return Side(count, engine)


def rows_of(member: int, step: int, run: RunConfig, tokens: int, ranks: Ranks) -> list[Example]:
    """This rank's part of a member's batch: random words with two answers of one token."""
    generator = make_generator(member, "rows", step)
    ids = torch.randint(100, 4000, (run.batch_size, tokens), generator=generator).tolist()
    rows = [
        Example(context_ids=row, movable=[True] * tokens, candidate_ids=[[10], [20]], gold=number % 2, index=number)
        for number, row in enumerate(ids)
    ]
    return rows[ranks.rank :: ranks.world]


def take_step(side: Side, run: RunConfig, unit: float, step: int, tokens: int, ranks: Ranks) -> None:
    """One optimizer step of all the side's prompts."""
    backbone, settings = side.engine.backbone, settings_of(run, unit)
    packed = [backbone.rows.pack(rows_of(member, step, run, tokens, ranks)) for member in range(side.count)]
    if not isinstance(side.engine, PopulationEngine):
        row = packed[0].to(ranks.device)
        optimizer_step(side.engine, row, run, settings, Noise(0, step), 0.01, global_count=run.batch_size)
        return
    members = [MemberStep(run, settings, Noise(number, step), row) for number, row in enumerate(packed)]
    population = population_row(members, side.engine.lengths).to(ranks.device)
    with backbone.shards.outside_layers():
        losses = population_loss(side.engine.trained(), backbone, population)
        side.engine.backward_sums([loss.total for loss in losses], [run.batch_size] * side.count)
    side.engine.step_members([MemberRate(0.01, 0.0, run.max_grad_norm)] * side.count)


def measure(sides: list[Side], run: RunConfig, rounds: int, tokens: int, ranks: Ranks) -> None:
    """A warm-up, then `rounds` steps of every side in turn."""
    backbone = sides[0].engine.backbone
    unit = backbone.mean_embedding_norm()
    for step in range(rounds + 1):
        for side in sides:
            backbone.shards.traffic.reset()
            ranks.barrier()
            wait(ranks.device)
            start = time.perf_counter()
            take_step(side, run, unit, step, tokens, ranks)
            wait(ranks.device)
            ranks.barrier()
            if step:
                side.seconds.append(time.perf_counter() - start)
                layers = [count for layer, count in backbone.shards.traffic.gathers.items() if int(layer) >= 0]
                side.gathers.append(statistics.mean(layers) if layers else 0.0)


def report(perturbation: str, sides: list[Side], ranks: Ranks) -> list[dict]:
    """A row for each number of members, printed by rank 0."""
    rows = []
    for side in sides:
        ratios = [many / one for many, one in zip(side.seconds, sides[0].seconds, strict=True)]
        ratio = statistics.median(ratios)
        rows.append({"perturbation": perturbation, "members": side.count, "world": ranks.world,
                     "seconds": statistics.median(side.seconds), "ratio": ratio, "times": side.count / ratio,
                     "gathers": statistics.median(side.gathers)})  # fmt: skip
        if ranks.is_main:
            row = rows[-1]
            print(f"{perturbation:10} {side.count:7} {row['seconds']:9.2f} {ratio:7.2f} {row['times']:7.2f} "
                  f"{row['gathers']:8.0f}", flush=True)  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=RunConfig().model)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8], help="the first is what ratios are to")
    parser.add_argument("--perturbations", nargs="+", default=["gaussian", "pgd"])
    parser.add_argument("--tokens", type=int, default=30, help="of a row")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    prepare_environment()
    run = RunConfig(model=args.model, batch_size=args.batch_size, precision=args.precision)
    prepared = prepare(run)
    ranks = start_processes()
    backbone = open_backbone(prepared, ranks)
    if ranks.is_main:
        print(
            f"{ranks.world} ranks on {ranks.device}, {backbone.dtype}; {args.batch_size} rows of {args.tokens} tokens"
        )
        print(f"{'':10} {'members':>7} {'seconds':>9} {'ratio':>7} {'times':>7} {'gathers':>8}", flush=True)
    rows = []
    for perturbation in args.perturbations:
        sides = [open_side(count, prepared, backbone, ranks) for count in args.members]
        measure(sides, replace(run, perturbation=perturbation), args.rounds, args.tokens, ranks)
        rows += report(perturbation, sides, ranks)
    if args.json and ranks.is_main:
        write_json(Path(args.json), rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
