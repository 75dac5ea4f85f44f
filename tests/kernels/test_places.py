"""Sums at places that occur many times: right, and the same to the bit in every run."""

import pytest
import torch

from ptp_ds.kernels.places import add_at
from tests.support.kernel_cases import DEVICE


@pytest.mark.parametrize("shape", [(200_000,), (20_000, 5)])
def test_sums_at_places_are_a_loops_in_every_run(shape, two_threads):
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(50, shape[:1], generator=generator)
    values = torch.randn(shape, generator=generator)
    wanted = torch.stack([values[places == place].double().sum(0) for place in range(50)])
    places, values = places.to(DEVICE), values.to(DEVICE)
    sums = [add_at(torch.zeros(50, *shape[1:], device=DEVICE), places, values) for _ in range(30)]
    torch.testing.assert_close(sums[0].cpu().double(), wanted, atol=1e-2, rtol=1e-4)
    assert all(torch.equal(one, sums[0]) for one in sums)
