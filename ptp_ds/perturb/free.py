"""PTP-ADV at the price of PTP-RN: one ascent step an optimizer step, from the backward that trains the prompt.

A batch is used for K optimizer steps in a row (--ascent_steps); its deltas begin at a random start, are carried from
one to the next and move by the gradient that each step's backward leaves on them (Shafahi et al. 2019, "Adversarial
training for free!"). Unlike pgd the prompt trains on every delta on the way, the first one random, each found against
the prompt of the step before; and K steps see one batch, so an epoch takes K times as many.
"""

from torch import Tensor

from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb.ascent import start_delta
from ptp_ds.perturb.noise import Noise
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.perturb.shared_pass import SharedPass


def free(
    shared: SharedPass | None, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise
) -> Tensor:
    """The carried delta, or a random start; asks for its gradient, along which the step's end moves it."""
    assert shared is not None
    delta = shared.carried_TH
    if delta is None:
        delta = start_delta(row, clean_TH.shape[-1], settings, noise)
    return delta.detach().requires_grad_()
