#!/usr/bin/env python
"""One train step of a large random Llama under ZeRO-3: time, memory, tokens per second, no weights needed.

    python scripts/bench_large.py --shape 8b --json llama8b.json

The weights are random, so the scores mean nothing; shapes and dtype are the real ones. --shape tiny runs anywhere.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from ptp_ds.backbone import Backbone, check_backbone
from ptp_ds.config import DEFAULT_DS_CONFIG, RunConfig
from ptp_ds.distributed import Ranks, prepare_environment, start_processes, stop_processes
from ptp_ds.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.engine import Engine
from ptp_ds.loading import build_sharded, fill_randomly
from ptp_ds.monitor import peak_memory_bytes
from ptp_ds.packing import Example, PackedRow, pack
from ptp_ds.perturb import Noise
from ptp_ds.prompts import SoftPrompt
from ptp_ds.run import report_error, versions
from ptp_ds.seeding import make_generator
from ptp_ds.step import optimizer_step, settings_of

SHAPES = {  # Llama 3 8B's configuration; tiny is for a check of this script itself
    "8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
}  # fmt: skip


def random_row(rows: int, vocabulary: int, rank: int) -> PackedRow:
    """Rows of 40 to 160 random tokens with two one-token answers, as RTE's are."""
    generator = make_generator(0, "large", rank)
    sizes = torch.randint(40, 161, (rows,), generator=generator).tolist()
    examples = [
        Example(context_ids=torch.randint(0, vocabulary, (size,), generator=generator).tolist(),
                movable=[True] * size, candidate_ids=[[1], [2]], gold=number % 2, index=number)
        for number, size in enumerate(sizes)
    ]  # fmt: skip
    return pack(examples)


def measure(engine: Engine, run: RunConfig, unit: float, row: PackedRow, ranks: Ranks, steps: int) -> dict[str, float]:
    """Median seconds of a step, its tokens per second over all ranks, and the peak memory of this rank."""
    seconds = []
    for step in range(steps + 1):
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        settings = settings_of(run, unit)
        loss, _ = optimizer_step(engine, row, run, settings, Noise(0, step), 1e-3)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if not torch.isfinite(loss.total):
        raise ValueError(f"The loss of {run.perturbation} is {float(loss.total)}; the benchmark's step is broken.")
    median = statistics.median(seconds[1:])  # the first one warms up
    return {
        "step_seconds": median, "tokens": loss.tokens * ranks.world,
        "tokens_per_second": loss.tokens * ranks.world / median, "peak_bytes": peak_memory_bytes(ranks.device),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="8b", choices=tuple(SHAPES))
    parser.add_argument("--rows", type=int, default=32, help="rows on each rank")
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
    model = build_sharded(config, resolved)
    fill_randomly(model)
    prompt = SoftPrompt(torch.zeros(args.prompt_length, config.hidden_size))
    backbone = Backbone(model)
    check_backbone(backbone)
    engine = Engine(prompt, backbone, resolved, ranks)
    generator = make_generator(0, "prompt")
    engine.set_prompt(0.02 * torch.randn(args.prompt_length, config.hidden_size, generator=generator))
    unit = backbone.mean_embedding_norm()
    row, table = random_row(args.rows, config.vocab_size, ranks.rank).to(ranks.device), []
    for method in ("none", "gaussian", "pgd"):
        chosen = RunConfig(ds_config=args.ds_config, batch_size=run.batch_size, perturbation=method)
        entry = {"shape": args.shape, "method": method, "dtype": str(resolved.dtype).removeprefix("torch."),
                 "rows": run.batch_size, "prompt_length": args.prompt_length, "world_size": ranks.world,
                 **measure(engine, chosen, unit, row, ranks, args.steps)}  # fmt: skip
        table.append(entry)
        if ranks.is_main:
            print(json.dumps(entry), flush=True)
    if args.json and ranks.is_main:
        Path(args.json).write_text(json.dumps({"rows": table, "versions": versions()}, indent=2) + "\n")
    stop_processes()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(report_error(error))
