"""Perturbations: each finds a delta [T, H] for the clean embeddings of a packed row.

A perturbation is a function (shared, row, clean_TH, settings, noise) -> delta_TH in a file of its own, named in
PERTURBATIONS. Only tokens with row.movable may get a non-zero delta. `shared` gives gradients of the divergence for
those that climb (SharedPass.gradient).
"""

from ptp_ds.perturb.base import Noise, Perturbation, PerturbSettings, SharedPass
from ptp_ds.perturb.free import free
from ptp_ds.perturb.gaussian import gaussian
from ptp_ds.perturb.pgd import pgd
from ptp_ds.perturb.uniform import uniform

PERTURBATIONS: dict[str, Perturbation] = {
    "gaussian": Perturbation(gaussian),
    "uniform": Perturbation(uniform),
    "pgd": Perturbation(pgd),
    "free": Perturbation(free, carries=True),
}

__all__ = ["PERTURBATIONS", "Noise", "PerturbSettings", "Perturbation", "SharedPass"]
