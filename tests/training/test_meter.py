"""What is summed up between two log lines: which step was not finite first."""

import pytest
import torch

from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.meter import Meter
from ptp_ds.training.step import StepLoss

GOOD, BAD = 1.0, float("nan")


@pytest.mark.parametrize(
    ("losses", "gradients", "told"),
    [
        ([GOOD, GOOD, GOOD], [False, False, False], None),
        ([GOOD, BAD, BAD], [False, True, True], ("loss", 12)),
        ([GOOD, GOOD, BAD], [True, False, True], ("prompt's gradient", 11)),
        ([GOOD, GOOD, GOOD], [False, True, False], ("prompt's gradient", 12)),
        ([BAD, GOOD, GOOD], [False, True, False], ("loss", 11)),
    ],
)
@pytest.mark.parametrize("on_device", [False, True])
def test_the_first_step_that_is_not_finite_is_named(losses, gradients, told, on_device):
    """Steps 11 to 13; a window before them was whole."""
    meter, one = Meter(Ranks(0, 1, torch.device("cpu"), None)), torch.tensor(1.0)
    meter.add(StepLoss(one, one, one, one, 3), 1, 9, {}, False)
    assert meter.reduce().broken is None
    for step, (loss, gradient) in enumerate(zip(losses, gradients, strict=True), 10):
        found = StepLoss(torch.tensor(loss), one, one, one, 3)
        meter.add(found, 1, step, {}, torch.tensor(gradient) if on_device else gradient)
    assert meter.reduce().broken == told
