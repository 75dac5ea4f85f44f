"""Shapes, dtypes and tolerances that the kernels' tests and benchmark share."""

import torch

from ptp_ds.kernels import Places, places_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative to the largest absolute value of the fp64 result: a few roundings of a sum, or one of the output
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
IMPLS = ("torch", "triton")
# examples' tokens: tiny, of length 1, odd, more than a block of the kernels
LENGTHS = ([1], [1, 1, 1], [3, 1, 7, 2], [37, 1, 70])
WIDTHS = (1, 5, 64, 130)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_places(lengths: list[int], seed: int = 0, still: bool = False, sources: bool = False) -> Places:
    """A row of examples of these lengths. still: the first one may not move at all. sources: the last token of each
    example takes its first token's delta and may not move itself."""
    tokens = sum(lengths)
    movable = torch.rand(tokens, generator=generator(seed)) < 0.8
    example_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    if still:
        movable[: lengths[0]] = False
    source = None
    if sources:
        source = torch.arange(tokens)
        ends = torch.tensor(lengths).cumsum(0)
        for end, length in zip(ends.tolist(), lengths, strict=True):
            source[end - 1] = end - length
            movable[end - 1] = movable[end - 1] and length == 1
    numbers = torch.arange(len(lengths)) * 1000 + 7
    places = places_of(movable.to(DEVICE), example_of.to(DEVICE), numbers.to(DEVICE))
    return places if source is None else Places(**{**vars(places), "source": source.to(DEVICE)})


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed)).to(DEVICE, dtype)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """Within TOLERANCE of the fp64 result; what isn't finite agrees in kind."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(found[~finite & ~expected.isnan()], expected[~finite & ~expected.isnan()])
    scale = float(expected[finite].abs().max()) if finite.any() else 0.0
    gap = float((found[finite] - expected[finite]).abs().max()) if finite.any() else 0.0
    assert gap <= factor * TOLERANCE[dtype] * scale + 1e-30, f"{gap:.2e} beside {scale:.2e}"


def every_second(x: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous: every second row of a larger tensor."""
    wide = torch.stack([x, torch.full_like(x, float("nan"))], dim=1).flatten(0, 1)
    return wide[::2]
