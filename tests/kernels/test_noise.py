"""The counter's numbers: known answers, the same from kernel and reference, independent of where an example lies."""

import math

import pytest
import torch

from ptp_ds.kernels import Places, noise
from ptp_ds.kernels.noise import philox
from tests.support.kernel_cases import DEVICE, IMPLS, LENGTHS, WIDTHS, make_places

# Random123's kat_vectors (Salmon et al. 2011): counter, key, output of philox4x32 with 10 rounds
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tuple(int(x) for x in philox(key, tuple(torch.tensor([c]) for c in counter))) == expected


CASES = [*zip(LENGTHS, WIDTHS, strict=True), ([2, 3], 2050)]
_LARGE = LENGTHS[-1]  # where the interpreter takes seconds: in every kind and norm by the slow tests alone


@pytest.mark.parametrize(
    ("lengths", "width", "kind", "norm"),
    [
        pytest.param(
            *case, kind, norm, marks=[pytest.mark.slow] if case[0] is _LARGE and (kind, norm) not in
            (("normal", "token_l2"), ("uniform", None)) else [],
        )
        for case in CASES for kind in ("normal", "uniform") for norm in (None, "frobenius", "token_l2")
    ],
)  # fmt: skip
def test_kernel_and_reference_draw_the_same(lengths, width, kind, norm):
    places = make_places(lengths, still=len(lengths) > 1)
    ours, theirs = (noise(kind, 3 << 40, 5, places, width, 0.7, norm=norm, impl=impl) for impl in ("triton", "torch"))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    assert not ours[~places.movable].any()
    assert torch.equal(ours, noise(kind, 3 << 40, 5, places, width, 0.7, norm=norm, impl="triton"))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_example_draws_the_same_anywhere(impl):
    places = make_places([9, 4, 6])
    whole = noise("normal", 11, 2, places, 33, 1.0, impl=impl)
    for example, some in enumerate((slice(0, 9), slice(9, 13), slice(13, 19))):
        alone = Places(
            places.movable[some], torch.zeros_like(places.example_of[some]),
            torch.tensor([0, some.stop - some.start], device=DEVICE), places.numbers[example : example + 1],
        )  # fmt: skip
        assert torch.equal(noise("normal", 11, 2, alone, 33, 1.0, impl=impl), whole[some])


@pytest.mark.parametrize("impl", IMPLS)
def test_seed_step_example_and_token_all_matter(impl):
    places = make_places([6, 6])
    moving = Places(torch.ones_like(places.movable), places.example_of, places.starts, places.numbers)
    first = noise("uniform", 1, 2, moving, 16, 1.0, impl=impl)
    for seed, step in ((2, 2), (1, 3), (1 + (1 << 40), 2), (1, 2 + (1 << 31))):
        assert float((noise("uniform", seed, step, moving, 16, 1.0, impl=impl) - first).abs().mean()) > 0.3
    rows = first.reshape(12, 16)
    gaps = (rows[:, None] - rows[None]).abs().mean(-1) + torch.eye(12, device=DEVICE)
    assert float(gaps.min()) > 0.2


@pytest.mark.parametrize("impl", IMPLS)
def test_the_numbers_are_distributed_as_said(impl):
    tokens, width = 64, 512
    places = Places(
        torch.ones(tokens, dtype=torch.bool, device=DEVICE), torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
        torch.tensor([0, tokens], device=DEVICE), torch.tensor([3], device=DEVICE),
    )  # fmt: skip
    count = tokens * width
    uniform = noise("uniform", 5, 0, places, width, 1.0, impl=impl)
    assert -1 <= float(uniform.min()) < -0.999
    assert 0.999 < float(uniform.max()) < 1
    assert abs(float(uniform.mean())) < 5 / math.sqrt(3 * count)
    normal = noise("normal", 5, 0, places, width, 1.0, impl=impl).double().flatten().sort().values
    below = 0.5 * (1 + torch.erf(normal / math.sqrt(2)))  # Kolmogorov and Smirnov's distance to the normal law
    distance = (below - (torch.arange(count, device=DEVICE) + 0.5) / count).abs().max()
    assert float(distance) < 2 / math.sqrt(count)
    assert abs(float((normal**4).mean()) - 3) < 0.2


@pytest.mark.parametrize("impl", IMPLS)
def test_a_norm_makes_every_example_or_token_that_size(impl):
    places = make_places([9, 1, 6], still=True)
    whole = noise("uniform", 1, 1, places, 20, 0.25, norm="frobenius", impl=impl)
    sizes = torch.stack([whole[first:last].norm() for first, last in ((0, 9), (9, 10), (10, 16))])
    moves = torch.stack([places.movable[first:last].any() for first, last in ((0, 9), (9, 10), (10, 16))])
    torch.testing.assert_close(sizes, torch.where(moves, 0.25, 0.0))
    each = noise("uniform", 1, 1, places, 20, 0.25, norm="token_l2", impl=impl).norm(dim=-1)
    torch.testing.assert_close(each, torch.where(places.movable, 0.25, 0.0))


def test_unknown_names_are_refused():
    places = make_places([2])
    with pytest.raises(ValueError, match="Unknown noise 'cauchy'; choose from normal, uniform"):
        noise("cauchy", 0, 0, places, 4, 1.0)
    with pytest.raises(ValueError, match="Unknown norm 'linf' of noise"):
        noise("normal", 0, 0, places, 4, 1.0, norm="linf")
