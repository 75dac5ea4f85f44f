#!/usr/bin/env python
"""Which operations of a train step make the host wait for the device, and from where they are called.

On a GPU torch's own warnings are counted (torch.cuda.set_sync_debug_mode). A CPU has none: there the operations are
counted that would wait on a GPU, as far as their names tell; copies between host and device don't show.
"""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from bench_random import Opened, config_of_shape, open_random
from gpu_record import NOT_ON_A_CPU, Record, part_parser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptp_ds.backbone.activations import Activations
from ptp_ds.commands.exits import run_command
from ptp_ds.config.run_config import RunConfig
from ptp_ds.ranks.distributed import exit_process, prepare_environment, start_processes

_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
          "unique_consecutive", "bincount", "allclose"}  # fmt: skip
_HERE = ("/ptp_ds/", "/deepspeed/", "/transformers/")


class Watch(TorchDispatchMode):
    """What waited inside: operations, and the lines of ptp_ds, DeepSpeed or transformers that they came from."""

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda, self.current = cuda, ""
        self.by_operation: Counter[str] = Counter()
        self.by_place: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.current = self.current, func.__name__
        try:
            if not self.cuda and would_wait(func._overloadpacket.__name__, args):
                self.note()
            return func(*args, **(kwargs or {}))
        finally:
            self.current = before

    def note(self, *_: Any) -> None:
        """Something waits now: called by a warning, whose text and place say nothing of ours."""
        self.by_operation[self.current or "between operations"] += 1
        self.by_place[place_of(traceback.extract_stack())] += 1


def would_wait(name: str, args: Any) -> bool:
    """Whether an operation of this name waits on a GPU: for a value, or for a size that depends on values."""
    picks = name in ("index", "index_put_", "index_put", "_index_put_impl_")
    return name in _WAITS or (picks and any(isinstance(x, torch.Tensor) and x.dtype == torch.bool
                                            for x in tree_leaves(args[1])))  # fmt: skip


def place_of(stack: traceback.StackSummary) -> str:
    """The innermost line of one of the packages that matter here."""
    for frame in reversed(stack):
        for part in _HERE:
            if part in frame.filename:
                return f"{part[1:]}{frame.filename.split(part)[-1]}:{frame.lineno}"
    return "elsewhere"


@contextmanager
def watching(cuda: bool) -> Iterator[Watch]:
    """Counts inside."""
    watch = Watch(cuda)
    if not cuda:
        with watch:
            yield watch
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        warnings.showwarning = watch.note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with watch:
                yield watch
        finally:
            torch.cuda.set_sync_debug_mode("default")


def count(opened: Opened, run: RunConfig, rows: int, record: Record, case: str) -> None:
    """A row: what waited in a step behind two others, on rows that none of them had."""
    cuda, packed = opened.ranks.device.type == "cuda", opened.rows(rows, 3)
    for number in range(2):
        opened.loss(packed[number], number, run)
    with watching(cuda) as watch:
        opened.loss(packed[2], 2, run)
    record.add(case, syncs=sum(watch.by_operation.values()), by_operation=dict(watch.by_operation.most_common()),
               by_place=dict(watch.by_place.most_common(20)), counted="warnings" if cuda else "names")  # fmt: skip


def main() -> int:
    prepare_environment()
    args = part_parser(__doc__).parse_args()
    ranks, record = start_processes(), Record(args.json)
    if ranks.device.type != "cuda":
        record.absent("torch.cuda.set_sync_debug_mode", f"{NOT_ON_A_CPU}; counted by the operations' names")
    shapes = [("tiny", {}, 4)] if args.dry else [("smollm2", {}, 16), ("8b", {"num_hidden_layers": 4}, 64)]
    for shape, changes, rows in shapes:
        with record.case(shape):
            opened = open_random(config_of_shape(shape, **changes), RunConfig(prompt_length=20), ranks)
            for mode in ("keep", "recompute"):
                opened.backbone.activations = Activations(mode)
                for method in ("none", "gaussian", "pgd"):
                    with record.case(f"{shape}, {method}, {mode}"):
                        run = replace(opened.run, perturbation=method)
                        count(opened, run, rows, record, f"{shape}, {method}, {mode}")
    return record.code


if __name__ == "__main__":
    exit_process(run_command(main))
