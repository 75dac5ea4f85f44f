"""Perturbations: how the second stream of a row differs from the clean one.

In embedding space a perturbation is a function (shared, row, clean_TH, settings, noise) -> delta_TH; only tokens with
row.movable may get a non-zero delta, and `shared` gives gradients of the divergence to those that climb
(SharedPass.gradient). In text space it is a function (examples, settings, noise) -> twins, or one that attacks with the
current prompt's losses and gradients, (scorer, settings) -> twins. Each has a file of its own and a line in
PERTURBATIONS.
"""

from ptp_ds.perturb.a2t import a2t
from ptp_ds.perturb.free import free
from ptp_ds.perturb.gaussian import gaussian
from ptp_ds.perturb.mask import mask
from ptp_ds.perturb.noise import Noise
from ptp_ds.perturb.parameters import Parameter
from ptp_ds.perturb.perturbation import Perturbation, Twin
from ptp_ds.perturb.pgd import pgd, pgd_start
from ptp_ds.perturb.settings import PerturbSettings
from ptp_ds.perturb.shared_pass import SharedPass
from ptp_ds.perturb.uniform import uniform

_ASCENT = ("alpha", "ascent_steps", "norm")
_NEAR = ("a2t_neighbours", "a2t_min_cosine")
PERTURBATIONS: dict[str, Perturbation] = {
    "gaussian": Perturbation(find=gaussian, sizes=("sigma",)),
    "uniform": Perturbation(find=uniform, sizes=("sigma",)),
    "mask": Perturbation(twins=mask, sizes=("mask_share",), reads=("mask_token",)),
    "mask+gaussian": Perturbation(find=gaussian, twins=mask, sizes=("mask_share", "sigma"), reads=("mask_token",)),
    "a2t": Perturbation(attack=a2t, sizes=("a2t_share",), reads=_NEAR),
    "a2t+gaussian": Perturbation(find=gaussian, attack=a2t, sizes=("a2t_share", "sigma"), reads=_NEAR),
    "pgd": Perturbation(find=pgd, start=pgd_start, sizes=("epsilon",), reads=_ASCENT),
    "free": Perturbation(find=free, sizes=("epsilon",), reads=_ASCENT, carries=True),
}

__all__ = ["PERTURBATIONS", "Noise", "Parameter", "PerturbSettings", "Perturbation", "SharedPass", "Twin"]
