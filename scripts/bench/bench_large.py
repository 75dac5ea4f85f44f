#!/usr/bin/env python
"""One train step of a large random Llama under ZeRO-3: time, memory, tokens per second, no weights needed.

    python scripts/bench/bench_large.py --shape 8b --json llama8b.json

The weights are random, so the scores mean nothing; shapes and dtype are the real ones. --shape tiny runs anywhere.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_measure import floor_operations, matrix_rates, wait
from peft_loop import PeftLoop
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from ptp_ds.adapters.record import versions
from ptp_ds.backbone.activations import Activations, memory_budget
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.backbone.sharded_loading import build_sharded, fill_randomly
from ptp_ds.commands.exits import run_command
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import DEFAULT_DS_CONFIG, RunConfig
from ptp_ds.models.heads import Head
from ptp_ds.packing.row import pack
from ptp_ds.perturb import Noise
from ptp_ds.prompts import SoftPrompt
from ptp_ds.ranks.distributed import Ranks, prepare_environment, start_processes
from ptp_ds.seeding import make_generator
from ptp_ds.tasks.example import Example
from ptp_ds.training.engine import Engine
from ptp_ds.training.monitor import peak_memory_bytes
from ptp_ds.training.step import optimizer_step, settings_of

METHODS = ("none", "gaussian", "pgd")
SHAPES = {  # Llama 3 8B's configuration; tiny is for a check of this script itself
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def random_examples(rows: int, vocabulary: int, rank: int) -> list[Example]:
    """Rows of 40 to 160 random tokens with two one-token answers, as RTE's are."""
    generator = make_generator(0, "large", rank)
    sizes = torch.randint(40, 161, (rows,), generator=generator).tolist()
    return [
        Example(context_ids=torch.randint(0, vocabulary, (size,), generator=generator).tolist(),
                movable=[True] * size, candidate_ids=[[1], [2]], gold=number % 2, index=number)
        for number, size in enumerate(sizes)
    ]  # fmt: skip


def seconds_of(call: Callable[[int], float], device: torch.device, steps: int) -> float:
    """Median seconds of `call(step)`, the first one left out; ValueError where a loss is not finite."""
    seconds = []
    for step in range(steps + 1):
        wait(device)
        start = time.perf_counter()
        loss = call(step)
        wait(device)
        seconds.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            raise ValueError(f"The loss of step {step} is {loss}; the benchmark's step is broken.")
    return statistics.median(seconds[1:])


def measure(engine: Engine, run: RunConfig, unit: float, examples: list[Example], ranks: Ranks, steps: int) -> dict:
    """Median seconds of a step, tokens per second over all ranks, this rank's peak memory and share of the matrix rate.

    rate_share: 4 N T operations a pass with gradient, over the step's time, over the machine's own matrix rate.
    """
    row, settings = pack(examples).to(ranks.device), settings_of(run, unit)
    tokens = [0]

    def step(number: int) -> float:
        loss, _ = optimizer_step(engine, row, run, settings, Noise(0, number), 1e-3, global_count=run.batch_size)
        tokens[0] = loss.tokens
        return float(loss.total.detach())

    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    median = seconds_of(step, ranks.device, steps)
    work = floor_operations(engine.backbone, run.perturbation, run.ascent_steps, engine.shape[0], row.num_tokens)
    return {
        "step_seconds": median, "tokens": tokens[0] * ranks.world,
        "tokens_per_second": tokens[0] * ranks.world / median,
        "peak_bytes": peak_memory_bytes(ranks.device), "ratio_peft_keep": None,
        "rate_share": work / median / matrix_rates(engine.backbone, min(row.num_tokens, 8192), ranks.device)["fastest"],
    }  # fmt: skip


def measure_peft(config: Any, dtype: torch.dtype, prompt: Tensor, run: RunConfig, unit: float, examples: list[Example],
                 head: Head, ranks: Ranks, steps: int) -> dict[str, float]:  # fmt: skip
    """Median seconds of peft's step with logits_to_keep on the same rows, per regulariser; a part of them at a time.

    peft keeps every activation, so it gets --peft_rows of the rows; the caller compares seconds a row.
    """
    with torch.device(ranks.device):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
    loop, found = PeftLoop(base, prompt, ranks.device, True, len(examples), head, "soft"), {}
    for method in METHODS:
        found[method] = seconds_of(lambda _, m=method: loop.step(examples, m, run, unit), ranks.device, steps)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="8b", choices=tuple(SHAPES))
    parser.add_argument("--rows", type=int, default=32, help="rows on each rank")
    parser.add_argument("--peft_rows", type=int, default=16, help="rows of peft's step, which keeps all activations")
    parser.add_argument("--prompt_length", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ds_config", default=DEFAULT_DS_CONFIG)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    prepare_environment()
    args = parse()
    ranks = start_processes()
    config = LlamaConfig(
        **SHAPES[args.shape], max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=None
    )
    run = RunConfig(ds_config=args.ds_config, batch_size=args.rows * ranks.world)
    resolved = resolve_ds_config(read_ds_config(args.ds_config), run, set(), ranks.world, config.hidden_size)
    examples = random_examples(args.rows, config.vocab_size, ranks.rank)
    generator = make_generator(0, "prompt")
    start = 0.02 * torch.randn(args.prompt_length, config.hidden_size, generator=generator)
    model = build_sharded(config, resolved)
    fill_randomly(model)
    activations = Activations("auto", budget_bytes=memory_budget(ranks.device))
    backbone = Backbone(model, activations)
    backbone.shards.share(ranks)  # as before training
    check_backbone(backbone)
    engine = Engine(SoftPrompt(start), backbone, resolved, ranks)
    unit, table = backbone.mean_embedding_norm(), []
    for method in METHODS:
        engine.set_prompt(start)
        chosen = replace(run, perturbation=method)
        entry = {"shape": args.shape, "method": method, "dtype": str(resolved.dtype).removeprefix("torch."),
                 "rows": run.batch_size, "prompt_length": args.prompt_length, "world_size": ranks.world,
                 "activations": backbone.activations.describe(),
                 **measure(engine, chosen, unit, examples, ranks, args.steps)}  # fmt: skip
        table.append(entry)
    if ranks.world == 1 and args.peft_rows:
        few = examples[: args.peft_rows]
        theirs = measure_peft(config, resolved.dtype, start, run, unit, few, backbone.head, ranks, args.steps)
        for entry in table:  # rows are drawn alike, so seconds a row compare
            per_row = theirs[entry["method"]] / len(few)
            entry["ratio_peft_keep"] = per_row / (entry["step_seconds"] / entry["rows"])
    for entry in table:
        if ranks.is_main:
            print(json.dumps(entry), flush=True)
    if args.json and ranks.is_main:
        Path(args.json).write_text(json.dumps({"rows": table, "versions": versions()}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
