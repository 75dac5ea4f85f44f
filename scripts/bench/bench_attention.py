#!/usr/bin/env python
"""Times attention over the tree, forward and backward, in the ways that could serve it, and checks that they agree.

reference  buckets of similar length, masks, scaled_dot_product_attention
ours       what training takes: flash kernels over ragged sequences on a GPU, merged by log-sum-exp
           (ptp_ds/flash_attention.py); the same merging block by block on a CPU (ptp_ds/tree_attention.py)
flex       torch's FlexAttention, compiled, over one row of prefix and blocks (CUDA only)
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bench_kernels import median_ms
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ptp_ds.adapters.record import versions
from ptp_ds.attention.flash import try_flash
from ptp_ds.attention.plan import plan_tree
from ptp_ds.attention.tree import attend_reference, attend_tree
from ptp_ds.packing.row import Block

Attend = Callable[..., Tensor]


def random_blocks(examples: int, length: int, branches: int) -> list[Block]:
    """Contexts of about `length` tokens, each followed by `branches` candidates of 3 tokens."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(length // 2, length * 3 // 2, (examples,), generator=generator).tolist()
    return [
        Block(size + 3 * branches, (0, *(size + 3 * n for n in range(branches))), (-1, *[0] * branches))
        for size in sizes
    ]


def ends_of(blocks: list[Block]) -> Tensor:
    """[T] the token behind the last one that sees each token: segments lie depth first."""
    ends, start = [], 0
    for block in blocks:
        stops = (*block.starts[1:], block.length)
        last = list(stops)
        for segment in range(len(stops) - 1, 0, -1):
            parent = block.parents[segment]
            if parent >= 0:
                last[parent] = max(last[parent], last[segment])
        for first, stop, end in zip(block.starts, stops, last, strict=True):
            ends += [start + end] * (stop - first)
        start += block.length
    return torch.tensor(ends)


def flex_mask(blocks: list[Block], prefix: int, device: torch.device) -> BlockMask:
    """Query q sees the prefix, and key k of the row where k <= q and q lies before the end of what is below k."""
    ends, tokens = ends_of(blocks).to(device), sum(block.length for block in blocks)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key - prefix).clamp_min(0)
        return (key < prefix) | ((own <= query) & (query < ends[own]))

    return create_block_mask(visible, None, None, tokens, prefix + tokens, device=device)


def flex_way(mask: BlockMask, compiled: bool) -> Attend:
    """FlexAttention with attend_reference's signature, less the plan."""
    function = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: tuple[Tensor, Tensor], scale: float) -> Tensor:
        keys, values = (torch.cat([t, x]).transpose(0, 1)[None] for t, x in zip(prefix, (k, v), strict=True))
        out = function(q.transpose(0, 1)[None], keys, values, block_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


def both_ways(attend: Callable[[list[Tensor]], Tensor], given: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    out = attend(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def measure(
    blocks: list[Block], args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Median milliseconds of each way, forward and backward; AssertionError where one differs from the reference."""
    heads, key_heads, width = args.heads
    tokens, scale = sum(block.length for block in blocks), width**-0.5
    shapes = [(tokens, heads), (tokens, key_heads), (tokens, key_heads), *[(args.prompt_length, key_heads)] * 2]
    given = [torch.randn(*shape, width, device=device).to(dtype) for shape in shapes]
    weight = torch.randn(given[0].shape, device=device).to(dtype)
    plan = plan_tree(blocks, 0, args.prompt_length, device)
    ways: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "reference": lambda x: attend_reference(*x[:3], plan, tuple(x[3:]), scale),
        "ours": lambda x: attend_tree(*x[:3], plan, tuple(x[3:]), scale=scale),
    }
    if device.type == "cuda":
        flex = flex_way(flex_mask(blocks, args.prompt_length, device), compiled=True)
        ways["flex"] = lambda x: flex(*x[:3], tuple(x[3:]), scale)
    expected, found = both_ways(ways["reference"], given, weight), {}
    for name, way in ways.items():
        pairs = zip(both_ways(way, given, weight), expected, strict=True)
        worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
        assert worst < (3e-2 if dtype != torch.float32 else 1e-4), f"{name} differs from the reference by {worst:.1e}"
        found[name] = median_ms(partial(both_ways, way, given, weight), device, args.repeats)
    return found


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=256 if cuda else 16)
    parser.add_argument("--length", type=int, default=80)
    parser.add_argument("--prompt_length", type=int, default=100)
    parser.add_argument("--branches", type=int, nargs="+", default=[0, 2], help="candidates behind each context")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128] if cuda else [9, 3, 64],
                        metavar=("QUERY", "KEY", "WIDTH"))  # fmt: skip
    parser.add_argument("--repeats", type=int, default=30 if cuda else 5)
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    try_flash(device, dtype, attend_reference)
    rows = []
    for branches in args.branches:
        blocks = random_blocks(args.examples, args.length, branches)
        found = measure(blocks, args, device, dtype)
        rows.append({"branches": branches, "tokens": sum(block.length for block in blocks), **found})
        times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items())
        ratios = ", ".join(f"{name}/ours {ms / found['ours']:.2f}" for name, ms in found.items() if name != "ours")
        print(f"{rows[-1]['tokens']} tokens, prompt {args.prompt_length}, {branches} branches: {times}, {ratios}")
    if args.json:
        report = {"device": torch.cuda.get_device_name() if cuda else "cpu", "versions": versions(), "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
