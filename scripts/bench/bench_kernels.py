#!/usr/bin/env python
"""Times every fused kernel against its torch reference, eager and compiled, and against the device's copy bandwidth.

One row a kernel and shape: milliseconds (medians), bytes that the operation must move, and the share of the copy
bandwidth (bytes read and written by a large copy, measured in the same run) that they reach. On a CPU only the
references run (auto), beside what they replaced.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ptp_ds.adapters.record import versions
from ptp_ds.kernels import Places, Sources, dual_divergence, explain, noise, pack_embed, perturb_step, places_of

Case = tuple[str, Callable[[str], Any], int]  # name, the operation with an impl, bytes


def median_ms(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median milliseconds of one call, by events on a GPU (the L2 cache flushed between calls)."""
    for _ in range(3):
        work()
    found = []
    flush = torch.empty(1 << 26, dtype=torch.int32, device=device) if device.type == "cuda" else None
    for _ in range(repeats):
        if flush is None:
            start = time.perf_counter()
            work()
            found.append((time.perf_counter() - start) * 1e3)
            continue
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last))
    return statistics.median(found)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, read and written, of a copy much larger than any cache."""
    source = torch.randn((1 << 28) if device.type == "cuda" else (1 << 25), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source), device, repeats) / 1e3)


def row_of(examples: int, length: int, device: torch.device) -> Places:
    """Examples of about `length` tokens, of which nine in ten may move."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length * 3 // 2, (examples,), generator=generator)
    movable = torch.rand(int(lengths.sum()), generator=generator) < 0.9
    example_of = torch.repeat_interleave(torch.arange(examples), lengths)
    return places_of(movable.to(device), example_of.to(device), torch.arange(examples, device=device))


def cases(places: Places, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> list[Case]:
    """Each operation at this shape, and the fewest bytes it can move: every input read once, every output written."""
    tokens, size = places.tokens, torch.finfo(dtype).bits // 8
    elements = tokens * width
    delta = 0.01 * torch.randn(tokens, width, device=device)
    gradient, embeds = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    table = torch.randn(vocabulary, width, device=device).to(dtype)
    prompt = torch.randn(100, width, device=device).to(dtype).requires_grad_()
    ids = torch.randint(0, vocabulary, (tokens,), device=device)
    prefix = -1 - torch.arange(100, device=device)
    own = torch.arange(tokens, device=device)
    sources = Sources(torch.cat([prefix, ids, ids]), torch.cat([own.new_full((100 + tokens,), -1), own]))
    weight = torch.randn(100 + 2 * tokens, width, device=device).to(dtype)
    free = delta.clone().requires_grad_()
    scores = torch.randn(2, places.examples, 8, device=device)
    gold = torch.zeros(places.examples, dtype=torch.int64, device=device)

    def step(norm: str) -> Callable[[str], Any]:
        return lambda impl: perturb_step(
            delta, gradient, places, norm=norm, radius=0.5, length=0.4, embeds_TH=embeds, impl=impl
        )

    def pack_back(impl: str) -> Any:
        out = pack_embed(table, prompt, sources, free, impl=impl)
        return torch.autograd.grad(out, (prompt, free), weight)

    def dual(impl: str) -> Any:
        leaves = [x.detach().requires_grad_() for x in scores]
        return torch.autograd.grad(dual_divergence(*leaves, gold, "sym_kl", reg_weight=1.0, impl=impl).total, leaves)

    moved = elements * (4 + 4 + 3 * size)
    packed = (2 * tokens + 100) * width * 2 * size + elements * 4
    return [
        ("perturb_step frobenius", step("frobenius"), moved),
        ("perturb_step token_l2", step("token_l2"), moved),
        ("perturb_step linf", step("linf"), moved),
        ("pack_embed forward", lambda impl: pack_embed(table, prompt.detach(), sources, delta, impl=impl), packed),
        ("pack_embed both ways", pack_back, packed + (tokens + 100) * width * (size + 4)),
        ("noise normal", lambda impl: noise("normal", 1 << 40, 1, places, width, 1.0, impl=impl), elements * 4),
        ("noise start", lambda impl: noise("uniform", 1 << 40, 1, places, width, 1.0, norm="frobenius", impl=impl),
         elements * 4),
        ("dual_divergence", dual, 4 * scores.nbytes),
    ]  # fmt: skip


def replaced(name: str, places: Places, width: int, device: torch.device) -> Callable[[], Any] | None:
    """What stood in the place of an operation before it: a generator for each example's noise."""
    if not name.startswith("noise"):
        return None
    lengths = places.starts.diff().tolist()

    def draw() -> torch.Tensor:
        parts = []
        for number, length in enumerate(lengths):
            generator = torch.Generator(device).manual_seed(number)
            out = torch.empty(length, width, device=device)
            parts.append(out.normal_(generator=generator) if "normal" in name else out.uniform_(generator=generator))
        return torch.where(places.movable[:, None], torch.cat(parts), 0.0)

    return draw


def same(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """Raises AssertionError where two implementations differ by more than a few roundings."""
    if isinstance(found, torch.Tensor):
        bound = 2e-2 if dtype != torch.float32 else 1e-4
        gap = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
        assert gap < bound, f"implementations differ by {gap:.1e}"
    elif found is not None:
        for one, other in zip(found, expected, strict=True):
            same(one, other, dtype)


def measure(case: Case, bandwidth: float, before: Callable[[], Any] | None, args: argparse.Namespace) -> dict[str, Any]:
    name, work, size = case
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    row: dict[str, Any] = {"kernel": name, "bytes": size, "eager_ms": None, "compiled_ms": None, "triton_ms": None}
    row["eager_ms"] = median_ms(lambda: work("torch"), device, args.repeats)
    if before is not None:
        row["before_ms"] = median_ms(before, device, args.repeats)
    if device.type == "cuda":
        expected = work("torch")
        same(work("triton"), expected, dtype)
        row["triton_ms"] = median_ms(lambda: work("triton"), device, args.repeats)
        try:
            compiled = torch.compile(lambda: work("torch"))
            same(compiled(), expected, dtype)
            row["compiled_ms"] = median_ms(compiled, device, args.repeats)
        except Exception as error:
            row["compile_error"] = str(error).splitlines()[0]
        row["bandwidth_share"] = size / (row["triton_ms"] / 1e3) / bandwidth
        row["eager_over_triton"] = row["eager_ms"] / row["triton_ms"]
        if row["compiled_ms"] is not None:
            row["compiled_over_triton"] = row["compiled_ms"] / row["triton_ms"]
    return row


def shown(value: float | None) -> str:
    return f"{'-' if value is None else format(value, '.3f'):>9}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", default="bfloat16" if cuda else "float32", choices=("float32", "bfloat16", "float16")
    )
    parser.add_argument("--examples", type=int, default=256 if cuda else 32)
    parser.add_argument("--length", type=int, default=80, help="tokens of an example, about")
    parser.add_argument("--width", type=int, default=4096 if cuda else 576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=50 if cuda else 10)
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    places = row_of(args.examples, args.length, device)
    bandwidth = copy_bandwidth(device, args.repeats)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{name}, {args.dtype}, {places.tokens} tokens of width {args.width}; copy {bandwidth / 1e9:.0f} GB/s; "
          f"auto runs {explain('auto', device, dtype)}; torch {torch.__version__}")  # fmt: skip
    print(f"{'kernel':24} {'MB':>8} {'eager':>9} {'compiled':>9} {'triton':>9} {'before':>9}  ms; "
          "share of copy, eager/triton, compiled/triton")  # fmt: skip
    rows = []
    for case in cases(places, args.width, args.vocabulary, dtype, device):
        row = measure(case, bandwidth, replaced(case[0], places, args.width, device), args)
        rows.append(row)
        columns = "".join(" " + shown(row.get(key)) for key in ("eager_ms", "compiled_ms", "triton_ms", "before_ms"))
        shares = "".join(
            " " + shown(row.get(key)) for key in ("bandwidth_share", "eager_over_triton", "compiled_over_triton")
        )
        print(f"{row['kernel']:24} {row['bytes'] / 1e6:8.1f}{columns} {shares}", flush=True)
    if args.json:
        report = {"device": name, "copy_bytes_per_second": bandwidth, "versions": versions(), "rows": rows}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
