"""Noise and random starts for deltas: numbers of a counter, so that they depend on nothing but what they are for.

Number k of column quad j of a token is output k of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3") with the run's and purpose's seed as key and (token's place in its example, j, example's number, step) as
counter; it stands in column k * ceil(H / 4) + j. The same example in the same step gets the same numbers on any rank,
in any micro-batch, at any place of a row, from the kernel and from the reference (normal ones to rounding).
"""

import math

import torch
from torch import Tensor

from ptp_ds.kernels.choice import block_of, jit, tl, use_triton, warps_of
from ptp_ds.kernels.places import Places

KINDS = ("normal", "uniform")
_SPLIT = 16  # programs that share an example's sums
_TINY = 1e-30
_MASK = 0xFFFFFFFF


def noise(
    kind: str, seed: int, step: int, places: Places, width: int, scale: float, *, norm: str | None = None,
    impl: str = "auto",
) -> Tensor:  # fmt: skip
    """[T, width] fp32 numbers of `kind` times `scale`, zero where nothing may move.

    kind: normal, or uniform in [-1, 1). norm: instead, scaled to size `scale`: "frobenius" an example's numbers,
    "token_l2" each token's. seed: 63 bits, of the run and the purpose. Raises ValueError for another kind or norm.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown noise {kind!r}; choose from {', '.join(KINDS)}.")
    if norm not in (None, "frobenius", "token_l2"):
        raise ValueError(f"Unknown norm {norm!r} of noise; choose frobenius or token_l2.")
    if use_triton(impl, places.movable):
        return _noise_triton(kind, seed, step, places, width, scale, norm)
    return _noise_torch(kind, seed, step, places, width, scale, norm)


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Philox4x32-10: four int64 tensors that broadcast, below 2^32, to four of random bits below 2^32."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK, seed >> 32 & _MASK
    for _ in range(10):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps like an unsigned product
        c0, c2 = (right >> 32 & _MASK) ^ c1 ^ k0, (left >> 32 & _MASK) ^ c3 ^ k1
        c1, c3 = right & _MASK, left & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return [c0, c1, c2, c3]


def _noise_torch(kind: str, seed: int, step: int, places: Places, width: int, scale: float, norm: str | None) -> Tensor:
    device, quads = places.movable.device, -(-width // 4)
    own = torch.stack([places.offsets(), places.numbers[places.example_of] & _MASK])
    steps = torch.full((1, 1), step & _MASK, device=device)
    out = torch.empty(places.tokens, 4 * quads, device=device)
    columns = torch.arange(quads, device=device)[None]
    chunk = max(1, (1 << 15) // quads)  # integers of a chunk stay in a CPU's cache
    for first in range(0, places.tokens, chunk) if device.type == "cpu" else [0]:
        some = slice(first, first + chunk if device.type == "cpu" else None)
        bits = philox(seed, (own[0, some, None], columns, own[1, some, None], steps))
        units = [(x >> 8).to(torch.float32).mul_(2.0**-24) for x in bits]
        if kind == "uniform":
            numbers = [unit.mul_(2.0).sub_(1.0) for unit in units]
        else:
            numbers = [n for pair in (units[:2], units[2:]) for n in _box_muller(*pair)]
        torch.cat(numbers, dim=1, out=out[some])
    found = torch.where(places.movable[:, None], out[:, :width], 0.0)
    if norm is None:
        return found * scale
    squares = found.square().sum(-1)
    if norm == "frobenius":
        squares = places.sums(squares)[places.example_of]
    return found * (scale / squares.sqrt().clamp_min(_TINY))[:, None]


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers from two in [0, 1); the first is moved to (0, 1]."""
    radius = (first + 2.0**-24).log().mul_(-2.0).sqrt_()
    angle = second * (2.0 * math.pi)
    return angle.cos().mul_(radius), angle.sin().mul_(radius)


@jit
def _units(bits):
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@jit
def _numbers(seed, place, quad, number, step, NORMAL: tl.constexpr):
    """Four blocks of numbers for the quads of tokens; all arguments int32 blocks of one shape."""
    b0, b1, b2, b3 = tl.philox(seed, place, quad, number, step)
    n0, n1, n2, n3 = _units(b0), _units(b1), _units(b2), _units(b3)
    if NORMAL:
        r0 = tl.sqrt(-2.0 * tl.log(n0 + 5.9604644775390625e-08))
        r1 = tl.sqrt(-2.0 * tl.log(n2 + 5.9604644775390625e-08))
        a0, a1 = n1 * 6.283185307179586, n3 * 6.283185307179586
        n0, n1, n2, n3 = r0 * tl.cos(a0), r0 * tl.sin(a0), r1 * tl.cos(a1), r1 * tl.sin(a1)
    else:
        n0, n1, n2, n3 = n0 * 2.0 - 1.0, n1 * 2.0 - 1.0, n2 * 2.0 - 1.0, n3 * 2.0 - 1.0
    return n0, n1, n2, n3


@jit
def _squares(n0, n1, n2, n3, quad, Q, H):
    """Sums of squares of four blocks, columns beyond the width left out."""
    total = tl.where(quad < H, n0 * n0, 0.0) + tl.where(quad + Q < H, n1 * n1, 0.0)
    return total + tl.where(quad + 2 * Q < H, n2 * n2, 0.0) + tl.where(quad + 3 * Q < H, n3 * n3, 0.0)


@jit(varying=("seed", "step"))
def _sums_kernel(
    movable,  # [T] uint8
    starts,  # [B + 1]
    numbers,  # [B]
    sums,  # [B, SPLIT]
    seed, step, Q, H, NORMAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[b, s] = sum of n^2 over every SPLIT-th movable token of example b."""
    example, part = tl.program_id(0), tl.program_id(1)
    first, last = tl.load(starts + example), tl.load(starts + example + 1)
    number = tl.load(numbers + example).to(tl.int32)
    zeros = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for token in range(first + part, last, SPLIT):
        if tl.load(movable + token) != 0:
            place = (token - first).to(tl.int32)
            for start in range(0, Q, BLOCK):
                quad = start + tl.arange(0, BLOCK)
                n0, n1, n2, n3 = _numbers(seed, zeros + place, quad, zeros + number, zeros + step, NORMAL)
                total += tl.where(quad < Q, _squares(n0, n1, n2, n3, quad, Q, H), 0.0)
    tl.store(sums + example * SPLIT + part, tl.sum(total))


@jit(varying=("seed", "step"))
def _noise_kernel(
    movable,  # [T] uint8
    example_of,  # [T]
    starts,  # [B + 1]
    numbers,  # [B]
    sums,  # [B, SPLIT], read for a frobenius norm
    out,  # [T, H] fp32
    seed, step, Q, H, scale, NORMAL: tl.constexpr, NORM: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's numbers of one block of quads, scaled."""
    token = tl.program_id(0)
    quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    example = tl.load(example_of + token)
    moves = tl.load(movable + token) != 0
    zeros = tl.zeros([BLOCK], tl.int32)
    place = (token - tl.load(starts + example)).to(tl.int32)
    number = tl.load(numbers + example).to(tl.int32)
    n0, n1, n2, n3 = _numbers(seed, zeros + place, quad, zeros + number, zeros + step, NORMAL)
    if NORM == 1:
        size = tl.sqrt(tl.sum(tl.load(sums + example * SPLIT + tl.arange(0, SPLIT))))
        scale = scale / tl.maximum(size, 1e-30)
    elif NORM == 2:
        size = tl.sqrt(tl.sum(tl.where(quad < Q, _squares(n0, n1, n2, n3, quad, Q, H), 0.0)))
        scale = scale / tl.maximum(size, 1e-30)
    scale = tl.where(moves, scale, 0.0)
    row = out + token.to(tl.int64) * H
    tl.store(row + quad, n0 * scale, mask=(quad < Q) & (quad < H))
    tl.store(row + quad + Q, n1 * scale, mask=(quad < Q) & (quad + Q < H))
    tl.store(row + quad + 2 * Q, n2 * scale, mask=(quad < Q) & (quad + 2 * Q < H))
    tl.store(row + quad + 3 * Q, n3 * scale, mask=(quad < Q) & (quad + 3 * Q < H))


def _noise_triton(
    kind: str, seed: int, step: int, places: Places, width: int, scale: float, norm: str | None
) -> Tensor:
    quads = -(-width // 4)
    out = torch.empty(places.tokens, width, device=places.movable.device)
    sums = out.new_empty(places.examples, _SPLIT)
    movable, normal = places.movable.view(torch.uint8), kind == "normal"
    step = step - (1 << 32) if step & 1 << 31 else step
    if norm == "frobenius":
        _sums_kernel[places.examples, _SPLIT](
            movable, places.starts, places.numbers, sums, seed, step, quads, width, NORMAL=normal, SPLIT=_SPLIT,
            BLOCK=block_of(quads, 512),
        )  # fmt: skip
    block = block_of(quads, 1 << 20 if norm == "token_l2" else 512)
    code = {None: 0, "frobenius": 1, "token_l2": 2}[norm]
    _noise_kernel[places.tokens, -(-quads // block)](
        movable, places.example_of, places.starts, places.numbers, sums, out, seed, step, quads, width, scale,
        NORMAL=normal, NORM=code, SPLIT=_SPLIT, BLOCK=block, num_warps=warps_of(4 * block),
    )  # fmt: skip
    return out
