"""What size 1 stands for: sigma, epsilon and alpha times a unit are l2 norms of a token's delta, or of an example's.

units       size 1 is                                              with it
relative    the backbone's mean embedding norm                     a size carries over between backbones
l2          1 in embedding coordinates                             balls: FreeLB's and VAT's sizes
coordinate  a token that is 1 in every coordinate: sqrt(H)         noise: standard deviation of a coordinate (R3F);
                                                                   linf: its largest absolute value (SMART)
"""

from collections.abc import Callable

import torch

UNITS: dict[str, Callable[[float, int], float]] = {
    "relative": lambda mean_norm, width: mean_norm,
    "l2": lambda mean_norm, width: 1.0,
    "coordinate": lambda mean_norm, width: width**0.5,
}


def unit_of(units: str, mean_norm: float, width: int) -> float:
    """The unit in embedding coordinates. mean_norm: of the backbone's embeddings; width: H."""
    return UNITS[units](mean_norm, width)


def vanishes(size: float, mean_norm: float, dtype: torch.dtype) -> bool:
    """Whether adding a delta of l2 norm `size` to an embedding of `mean_norm` rounds most of it away in `dtype`.

    Most: of normal coordinates of that size less than half of the delta arrives, and three of four don't move at all.
    """
    return 0 < size < torch.finfo(dtype).eps / 8 * mean_norm
