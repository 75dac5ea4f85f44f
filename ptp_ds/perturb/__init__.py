"""Perturbations: each finds a delta [T, H] for the clean embeddings of a packed row.

A perturbation is a function (clean_pass, row, clean_TH, settings, noise) -> delta_TH in a file of its own, named in
PERTURBATIONS. Only tokens with row.movable may get a non-zero delta. Noise is given no clean pass: both streams then
run as one pass. An adversarial one climbs from the clean pass.
"""

from ptp_ds.perturb.base import Noise, Perturbation, PerturbSettings, SharedPass
from ptp_ds.perturb.gaussian import gaussian
from ptp_ds.perturb.pgd import pgd
from ptp_ds.perturb.uniform import uniform

PERTURBATIONS: dict[str, Perturbation] = {
    "gaussian": Perturbation(gaussian, adversarial=False),
    "uniform": Perturbation(uniform, adversarial=False),
    "pgd": Perturbation(pgd, adversarial=True),
}

__all__ = ["PERTURBATIONS", "SharedPass", "Noise", "PerturbSettings", "Perturbation"]
