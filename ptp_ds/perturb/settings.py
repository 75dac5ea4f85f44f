"""The numbers that a perturbation is given."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class PerturbSettings:
    """sigma, epsilon, alpha are in units of `unit`, the backbone's mean embedding norm.

    sigma: root-mean-square l2 norm of a noisy token's delta. epsilon: radius of the ball (see perturb.ball for each
    norm). alpha: length of an ascent step. steps: K ascent steps. divergence: what the ascent climbs. mask_share: share
    of words that are masked. mask_id: the token that masks. a2t_share: share of words that a2t may swap. kernels: which
    implementation of ptp_ds.kernels runs. own: the values of the parameters that a perturbation file declares, by name.
    vocabulary: how many tokens the model has. room: how many a twin and its longest answer, without its last one, may
    come to (Example.path_length). None: they are not checked.
    """

    unit: float
    sigma: float
    epsilon: float
    alpha: float
    steps: int
    norm: str
    divergence: str
    mask_share: float = 0.0
    mask_id: int = 0
    a2t_share: float = 0.0
    kernels: str = "auto"
    own: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    vocabulary: int | None = None
    room: int | None = None
