"""Perturbations: each finds a delta [T, H] for the clean embeddings of a packed row.

A perturbation is a function (ascent, row, clean_TH, settings, noise) -> delta_TH; add one in a file of its own and
name it in PERTURBATIONS. Only tokens with row.movable may get a non-zero delta.
"""

from ptp_ds.perturb.base import Ascent, Noise, Perturbation, PerturbSettings
from ptp_ds.perturb.gaussian import gaussian
from ptp_ds.perturb.pgd import pgd
from ptp_ds.perturb.uniform import uniform

PERTURBATIONS: dict[str, Perturbation] = {"gaussian": gaussian, "uniform": uniform, "pgd": pgd}

__all__ = ["PERTURBATIONS", "Ascent", "Noise", "PerturbSettings", "Perturbation"]
