"""What is left around the matrix products, fused: one file an operation, with its Triton kernel and torch reference.

noise            numbers of a counter for deltas: normal, uniform, random starts
perturb_step     norm, ascent, projection and the moved input embeddings
pack_embed       token embeddings, prompt rows and deltas into the packed row
dual_divergence  cross-entropy and divergence of both streams, with their gradients

impl="auto" | "triton" | "torch" chooses; see ptp_ds.kernels.choice.
"""

from ptp_ds.kernels.choice import explain
from ptp_ds.kernels.dual_divergence import DualLoss, dual_divergence
from ptp_ds.kernels.noise import noise
from ptp_ds.kernels.pack_embed import Sources, pack_embed
from ptp_ds.kernels.perturb_step import perturb_step
from ptp_ds.kernels.places import Places, places_of

__all__ = [
    "DualLoss", "Places", "Sources", "dual_divergence", "explain", "noise", "pack_embed", "perturb_step",
    "places_of",
]  # fmt: skip
