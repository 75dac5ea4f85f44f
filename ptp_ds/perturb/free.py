"""PTP-ADV at the price of PTP-RN: one ascent step an optimizer step, from the backward that trains the prompt.

A batch is used for K optimizer steps in a row (--ascent_steps); its deltas begin at a random start, are carried from
one to the next and move by the gradient that each step's backward leaves on them (Shafahi et al. 2019, "Adversarial
training for free!"). Unlike pgd the prompt trains on every delta on the way, the first one random, each found against
the prompt of the step before; and K steps see one batch, so an epoch takes K times as many.
"""

from torch import Tensor

from ptp_ds.packing import PackedRow
from ptp_ds.perturb.ball import movable_only, project, random_start, steepest
from ptp_ds.perturb.base import Noise, PerturbSettings, SharedPass


def free(shared: SharedPass, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise) -> Tensor:
    """The carried delta, or a random start; asks for its gradient, which `advance` takes."""
    delta = shared.carried_TH
    if delta is None:
        radius = settings.epsilon * settings.unit
        start = movable_only(noise.uniform(row, clean_TH.shape[-1], "start"), row)
        delta = project(random_start(start, row, settings.norm, radius), row, settings.norm, radius)
    return delta.detach().requires_grad_()


def advance(delta_TH: Tensor, gradient_TH: Tensor, row: PackedRow, settings: PerturbSettings) -> Tensor:
    """The next step's delta: one ascent step along the gradient of the loss, projected into the ball."""
    radius, length = settings.epsilon * settings.unit, settings.alpha * settings.unit
    step = steepest(movable_only(gradient_TH, row), row, settings.norm, length)
    return project(delta_TH.detach() + step, row, settings.norm, radius)
