#!/usr/bin/env python
"""Flash attention over the tree against the reference in fp32: output, all gradients, and time, in its harder cases.

Cases: head widths 64, 128 and 256; several runs of queries on one prefix; branches; several prefixes; an encoder's
blocks, which aren't causal. Bounds are those of the start-up trial (ptp_ds.attention.flash). A CPU has no such kernels:
there the plans are made, and the reference in half precision stands in their place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from bench_attention import both_ways, random_blocks
from bench_kernels import median_ms
from gpu_record import NOT_ON_A_CPU, Record, part_parser
from torch import Tensor

from ptp_ds.attention.flash import Part, flash_attend, parts_of, prefix_part
from ptp_ds.attention.plan import Plan, plan_forest, plan_tree
from ptp_ds.attention.tree import attend_reference
from ptp_ds.commands.exits import run_command
from ptp_ds.packing.row import Block
from ptp_ds.ranks.distributed import exit_process, prepare_environment

_BOUND = 2e-2
_HEADS = {"cuda": (8, 2), "cpu": (2, 1)}


@dataclass(frozen=True)
class Case:
    """blocks: the row's. prefixes: tokens of each prefix; with several, one tree of blocks stands on each."""

    name: str
    blocks: Sequence[Block]
    prefixes: tuple[int, ...] = (100,)

    def trees(self) -> list[tuple[int, Sequence[Block]]]:
        """(number of its prefix, blocks) of each tree: the blocks in equal parts."""
        count, whole = len(self.prefixes), len(self.blocks)
        return [(n, self.blocks[whole * n // count : whole * (n + 1) // count]) for n in range(count)]

    def plan(self, device: torch.device) -> Plan:
        """Who sees whom, for both ways."""
        if len(self.prefixes) == 1:
            return plan_tree(self.blocks, 0, self.prefixes[0], device)
        return plan_forest(self.trees(), self.prefixes, device)

    def parts(self) -> list[Part]:
        """The flash kernels' sequences, on the host."""
        trees = self.trees()
        tokens = [sum(block.length for block in blocks) for _, blocks in trees]
        return [prefix_part(tokens, [n for n, _ in trees], self.prefixes), *parts_of(self.blocks)]


def cases(examples: int, length: int) -> list[Case]:
    """The harder cases, at this size."""
    chain = [Block(block.length, block.starts, block.parents) for block in random_blocks(examples, length, 0)]
    branches = random_blocks(examples, length, 3)
    deep = [Block(length, (0, length // 2, length // 2 + 3), (-1, 0, 1))] * examples
    open_blocks = [Block(block.length, (0,), (-1,), causal=False) for block in chain]
    return [
        Case("contexts", chain), Case("three answers each", branches), Case("two ancestors", deep),
        Case("three prefixes", branches, (100, 20, 57)), Case("non-causal", open_blocks),
    ]  # fmt: skip


def compare(case: Case, width: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict[str, float]:
    """Relative difference of output and gradients from the reference in fp32, and both ways' milliseconds."""
    tokens, (heads, key_heads) = sum(block.length for block in case.blocks), _HEADS[device.type]
    shapes = [(tokens, heads), *[(tokens, key_heads)] * 2, *[(sum(case.prefixes), key_heads)] * 2]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, width, generator=generator).to(device, dtype) for shape in shapes]
    weight = torch.randn(given[0].shape, generator=generator).to(device, dtype)
    plan, scale = case.plan(device), width**-0.5

    def way(attend: Callable[..., Tensor], x: list[Tensor]) -> Tensor:
        return attend(*x[:3], plan, (x[3], x[4]), scale)

    flash = partial(way, flash_attend if device.type == "cuda" else attend_reference)
    reference = partial(way, attend_reference)
    expected = both_ways(reference, [x.float() for x in given], weight.float())
    pairs = zip(both_ways(flash, given, weight), expected, strict=True)
    found = {"difference": max(float((a.float() - b).norm() / b.norm()) for a, b in pairs), "bound": _BOUND}
    for name, one in (("flash_ms", flash), ("reference_ms", reference)):
        found[name] = median_ms(partial(both_ways, one, given, weight), device, repeats)
    return {**found, "reference_over_flash": found["reference_ms"] / found["flash_ms"]}


def describe(case: Case) -> str:
    """The kernels' sequences in words."""
    return "; ".join(
        f"{part.cu_q.shape[0] - 1} runs of up to {part.max_q} queries on up to {part.max_k} keys"
        f"{', causal' if part.causal else ''}" for part in case.parts()
    )  # fmt: skip


def try_case(case: Case, width: int, dtype: torch.dtype, device: torch.device, record: Record) -> None:
    """One row of the table; ValueError where the kernels differ by more than the bound."""
    name = f"{case.name}, d {width}, {str(dtype).removeprefix('torch.')}"
    with record.case(name):
        found, parts = compare(case, width, dtype, device, 10 if device.type == "cuda" else 1), describe(case)
        if device.type != "cuda":
            half = found["difference"]
            record.add(name, absent=f"{NOT_ON_A_CPU} (the reference in half precision differs by {half:.1e} from fp32)",
                       parts=parts)  # fmt: skip
            return
        record.add(name, parts=parts, **found)
        if not found["difference"] <= _BOUND:
            raise ValueError(f"flash differs from the reference by {found['difference']:.1e}")


def main() -> int:
    prepare_environment()
    args = part_parser(__doc__).parse_args()
    record, device = Record(args.json), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in cases(*((8, 150) if args.dry else (64, 80))):
        for width in (64, 128, 256):
            for dtype in (torch.bfloat16, torch.float16):
                try_case(case, width, dtype, device, record)
    return record.code


if __name__ == "__main__":
    exit_process(run_command(main))
