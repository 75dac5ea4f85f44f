#!/usr/bin/env python
"""What settings do to a step: chunk_tokens, keep and recompute, zero2 and zero3, the schedule, joint products, Liger's
kernels.

One setting differs from the first row at a time, but for chunk_tokens, which is tried with both kinds of activations.
"""

import gc
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from bench_large import measure
from bench_random import Opened, config_of_shape, open_random
from gpu_record import NOT_ON_A_CPU, Record, part_parser

from ptp_ds.backbone.activations import CHUNK_TOKENS
from ptp_ds.commands.exits import run_command
from ptp_ds.config.run_config import RunConfig
from ptp_ds.kernels import liger
from ptp_ds.ranks.distributed import Ranks, exit_process, prepare_environment, start_processes

SCHEDULES = ("breadth", "depth")
_LATER = ("chunk_tokens", "activations", "schedule", "gradient_accumulation_steps")  # what a model that is built takes


@dataclass(frozen=True)
class Size:
    """A shape of bench_random, its layers, rows of a step, timed steps, and chunk_tokens to try."""

    shape: str
    changes: dict[str, Any]
    rows: int
    steps: int
    chunks: Sequence[int]


DRY = [Size("tiny", {}, 4, 1, (100, 2048))]
SIZES = [
    Size("8b", {"num_hidden_layers": 8}, 160, 2, (2048, 8192, 32768)),
    Size("smollm2", {}, 160, 3, (2048, 8192, 32768)),
]


def settings_of(size: Size) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings that differ from the defaults) of each row."""
    for chunk in size.chunks:
        for mode in ("keep", "recompute"):
            yield f"chunk_tokens {chunk}, {mode}", {"chunk_tokens": chunk, "activations": mode}
    wide = {"chunk_tokens": max(size.chunks), "activations": "keep"}
    yield "zero2", {**wide, "ds_config": "ds_configs/zero2.json"}
    for schedule in SCHEDULES:
        yield f"schedule {schedule}", {**wide, "schedule": schedule, "gradient_accumulation_steps": 4}


@contextmanager
def without_liger() -> Iterator[None]:
    """Models that are built inside are given none of Liger's kernels."""
    with mock.patch.object(liger, "available", return_value=False):
        yield


class Bench:
    """Models of one size, one at a time: settings that a model needn't be built anew for share it."""

    def __init__(self, size: Size, ranks: Ranks, record: Record) -> None:
        self.size, self.ranks, self.record = size, ranks, record
        self.opened: Opened | None = None
        self.built: Any = None

    def try_setting(
        self, name: str, settings: dict[str, Any], fused: bool = True, joint: bool | None = None
    ) -> None:  # fmt: skip
        """One row; a setting that the device has no memory for is told as such. fused: with Liger's kernels. joint:
        with one product for layers that share an input, None: as a run has it.
        """
        size, case = self.size, f"{self.size.shape}, {name}"
        run = RunConfig(perturbation="gaussian", prompt_length=100, **settings)
        with self.record.case(case, may_not_fit=True):
            built = {name: settings[name] for name in settings if name not in _LATER}
            opened = self.open(run, fused, joint, built)
            chunk = run.chunk_tokens or CHUNK_TOKENS[self.ranks.device.type]
            opened.backbone.activations = replace(opened.backbone.activations, mode=run.activations, chunk_tokens=chunk)
            about = {"dtype": opened.dtype, "joined": opened.backbone.joined}
            self.record.add(case, **settings, **about, **measure(opened, run, size.rows, size.steps))

    def open(self, run: RunConfig, fused: bool, joint: bool | None, built: dict[str, Any]) -> Opened:
        """The model for these settings, the one at hand where it was built with the same ones."""
        if self.opened is None or self.built != (fused, joint, built):
            self.opened = None
            gc.collect()
            with nullcontext() if fused else without_liger():
                config = config_of_shape(self.size.shape, **self.size.changes)
                self.opened = open_random(config, run, self.ranks, joint=joint)
            self.built = fused, joint, built
        return self.opened


def main() -> int:
    prepare_environment()
    args = part_parser(__doc__).parse_args()
    ranks, record = start_processes(), Record(args.json)
    installed = importlib.util.find_spec("liger_kernel") is not None
    if not installed:
        record.absent("liger", "liger_kernel isn't installed (pip install ptp_ds[kernels])")
    elif ranks.device.type != "cuda":
        record.absent("liger", NOT_ON_A_CPU)
    for size in DRY if args.dry else SIZES:
        bench = Bench(size, ranks, record)
        for name, settings in settings_of(size):
            bench.try_setting(name, settings)
        wide = {"chunk_tokens": max(size.chunks), "activations": "keep"}
        for name, joint in (("joint products", True), ("products apart", False)):
            bench.try_setting(name, wide, joint=joint)
        if installed and ranks.device.type == "cuda":
            for name, fused in (("with Liger", True), ("without Liger", False)):
                bench.try_setting(name, wide, fused)
    return record.code


if __name__ == "__main__":
    exit_process(run_command(main))
