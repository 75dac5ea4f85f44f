#!/usr/bin/env python
"""Rows a second of an evaluation, and what answers of several tokens cost at a vocabulary of 128k words.

Rows of 40 to 160 random tokens behind a prompt of 100. many: two answers of three and two tokens in the place of two of
one, whose scores need the logits of the whole vocabulary at every place of every answer.
"""

import statistics
from dataclasses import replace
from typing import Any

from bench_measure import peak_of
from bench_random import Opened, config_of_shape, open_random, random_examples, timed_steps
from gpu_record import Record, part_parser

from ptp_ds.commands.exits import run_command
from ptp_ds.config.run_config import RunConfig
from ptp_ds.ranks.distributed import exit_process, prepare_environment, start_processes
from ptp_ds.training.evaluate import score_examples

ANSWERS = {"one": (1, 1), "many": (3, 2)}


def rate(opened: Opened, rows: int, budget: int, lengths: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Rows and tokens a second of scoring `rows` fresh rows in passes of `budget` tokens, and the memory of it."""
    vocabulary, device = opened.config.vocab_size, opened.ranks.device
    draws = [random_examples(rows, vocabulary, 0, draw, lengths) for draw in range(steps + 1)]

    def score(number: int) -> Any:
        return score_examples(opened.backbone, opened.start, draws[number], opened.ranks, budget)

    with peak_of(opened.backbone, device) as peak:
        score(0)
    seconds, scores = timed_steps(score, device, steps, warm=True)
    for found in scores:
        if not found.isfinite().all():
            raise ValueError("An evaluation's scores aren't finite; the benchmark's model is broken.")
    tokens = statistics.mean(sum(example.packed_length for example in examples) for examples in draws[1:])
    median = statistics.median(seconds)
    return {"rows_per_second": rows / median, "tokens_per_second": tokens / median, "peak_bytes": peak.allocated,
            "reserved_bytes": peak.reserved}  # fmt: skip


def step(opened: Opened, rows: int, lengths: tuple[int, ...], steps: int) -> dict[str, Any]:
    """Seconds and memory of a gaussian train step on such rows."""
    run, packed = replace(opened.run, perturbation="gaussian"), opened.rows(rows, steps + 1, lengths)
    with peak_of(opened.backbone, opened.ranks.device) as peak:
        opened.step(packed[0], 0, run)
    seconds, values = timed_steps(lambda n: opened.step(packed[n], n, run), opened.ranks.device, steps, warm=True)
    median = statistics.median(seconds)
    return {"step_seconds": median, "tokens_per_second": values[0][1] / median, "peak_bytes": peak.allocated,
            "reserved_bytes": peak.reserved}  # fmt: skip


def main() -> int:
    prepare_environment()
    args = part_parser(__doc__).parse_args()
    ranks, record = start_processes(), Record(args.json)
    # shape, layers, rows that are scored, rows of a step, tokens of a pass, timed repetitions
    sizes = [("tiny-128k", 2, 8, 4, [500], 1)] if args.dry else [
        ("smollm2", 30, 2000, 64, [4096, 32768], 2), ("8b", 4, 1000, 64, [4096, 32768], 2)
    ]  # fmt: skip
    for shape, layers, scored, trained, budgets, steps in sizes:
        with record.case(shape):
            config = config_of_shape(shape, num_hidden_layers=layers)
            opened = open_random(config, RunConfig(prompt_length=100), ranks)
            for name, lengths in ANSWERS.items():
                for budget in budgets:
                    case = f"{shape}, {name}-token answers, passes of {budget} tokens"
                    with record.case(case):
                        record.add(case, vocabulary=config.vocab_size, **rate(opened, scored, budget, lengths, steps))
                case = f"{shape}, {name}-token answers, a train step of {trained} rows"
                with record.case(case):
                    record.add(case, vocabulary=config.vocab_size, **step(opened, trained, lengths, steps))
    return record.code


if __name__ == "__main__":
    exit_process(run_command(main))
