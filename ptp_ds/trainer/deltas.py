"""Deltas and masks on a padded batch, by the kernels and random numbers that packed rows use.

A batch's tokens [B, T] are flattened: its rows are the examples, so that an example that begins at its row's start gets
the very numbers that it gets in a packed row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ptp_ds.kernels import Places, noise, perturb_step
from ptp_ds.perturb.ball import radius_of
from ptp_ds.seeding import derive_seed
from ptp_ds.trainer.settings import PTPSettings

Gradient = Callable[[Tensor], Tensor]  # of the divergence at a delta, both [B, T, H]


def batch_places(movable_BT: Tensor, numbers_B: Tensor) -> Places:
    """Where the tokens of a padded batch lie among its rows. numbers_B: of the examples, for their noise."""
    rows, width = movable_BT.shape
    device = movable_BT.device
    return Places(
        movable_BT.reshape(-1), torch.arange(rows, device=device).repeat_interleave(width),
        torch.arange(rows + 1, device=device) * width, numbers_B,
    )  # fmt: skip


def noisy_delta(places: Places, width: int, unit: float, settings: PTPSettings, step: int) -> Tensor:
    """[N, H] fp32 noise of `ptp train`'s gaussian or uniform, zero where nothing may move."""
    size = settings.sigma * unit
    key = derive_seed(settings.seed, "noise")
    if settings.perturbation == "gaussian":
        return noise("normal", key, step, places, width, size / width**0.5)
    return noise("uniform", key, step, places, width, size * (3.0 / width) ** 0.5)


def climbed_delta(
    places: Places, width: int, unit: float, settings: PTPSettings, step: int, gradient: Gradient
) -> Tensor:
    """[N, H] pgd's delta: K steps up the divergence from a random point of the ball, each projected into it."""
    norm, key = settings.norm, derive_seed(settings.seed, "start")
    radius, length = (radius_of(norm, size * unit, width) for size in (settings.epsilon, settings.run.step_length))
    if norm == "linf":
        delta = noise("uniform", key, step, places, width, radius)
    else:
        delta = noise("uniform", key, step, places, width, 0.5 * radius, norm=norm)
    for _ in range(settings.ascent_steps):
        delta, _moved = perturb_step(delta, gradient(delta), places, norm=norm, radius=radius, length=length)
    return delta


def masked_ids(input_ids: Tensor, movable_BT: Tensor, numbers_B: Tensor, settings: PTPSettings, step: int) -> Tensor:
    """[B, T] ids in which each row's share of movable tokens is hidden: at least one, none for a share of 0."""
    assert settings.mask_token_id is not None
    places = batch_places(movable_BT, numbers_B)
    drawn = noise("uniform", derive_seed(settings.seed, "mask"), step, places, 1, 1.0).reshape(movable_BT.shape)
    ranked = torch.where(movable_BT, drawn, torch.inf).argsort(-1).argsort(-1)
    counts = movable_BT.sum(-1, keepdim=True)
    least = int(settings.mask_share > 0)
    hidden = (ranked < (counts * settings.mask_share).round().clamp_min(least)) & movable_BT
    return torch.where(hidden, settings.mask_token_id, input_ids)


def example_norms(delta_NH: Tensor, rows: int) -> Tensor:
    """[B] l2 norm of each row's delta."""
    return delta_NH.reshape(rows, -1).norm(dim=-1)
