"""Names that flags offer, without what they stand for: --help and a run's checks need no torch.

Each name's meaning is in the module named beside it, which offers exactly these (tests/config/test_choices.py).
"""

ACTIVATIONS = ("auto", "keep", "recompute")  # ptp_ds.backbone.activations
DIVERGENCES = ("kl", "sym_kl", "js", "ce")  # ptp_ds.objective
GRADIENTS = ("both", "clean_fixed")  # ptp_ds.objective: where the divergence's gradient goes
HEADS = ("causal", "masked", "classes", "seq2seq")  # ptp_ds.models.heads
IMPLS = ("auto", "triton", "torch")  # ptp_ds.kernels.choice
NORMS = ("frobenius", "token_l2", "linf")  # ptp_ds.perturb.ball
PERTURBATIONS = (  # ptp_ds.perturb
    "none", "gaussian", "uniform", "mask", "mask+gaussian", "a2t", "a2t+gaussian", "pgd", "free",
)  # fmt: skip
PRECISIONS = ("auto", "fp32", "bf16", "fp16")  # ptp_ds.precision
SCHEDULES = ("auto", "breadth", "depth")  # ptp_ds.training.micro_batches
UNITS = ("relative", "l2", "coordinate")  # ptp_ds.perturb.units
