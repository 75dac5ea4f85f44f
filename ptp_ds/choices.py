"""Names that flags offer, without what they stand for: --help and a run's checks need no torch.

Each name's meaning is in the module named beside it, which offers exactly these (tests/config/test_choices.py).
"""

from collections.abc import Mapping

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
# What a setting is called by transformers, peft and others -> ours, and a remark.
ELSEWHERE: Mapping[str, tuple[str, str]] = {
    "learning_rate": ("lr", ""), "lr_scheduler_type": ("lr_schedule", ""), "output": ("output_dir", ""),
    **dict.fromkeys(("num_train_epochs", "epochs"), ("max_steps", "in optimizer steps: epochs aren't counted")),
    **dict.fromkeys(("per_device_train_batch_size", "batch"), ("batch_size", "the rows of a step over all ranks")),
    "gradient_checkpointing": ("activations", "set to recompute"), "bf16": ("precision", "set to bf16"),
    "fp16": ("precision", "set to fp16"), "num_virtual_tokens": ("prompt_length", ""),
    "model_name_or_path": ("model", ""), "logging_steps": ("log_every", ""), "eval_steps": ("eval_every", ""),
    "save_steps": ("save_every", ""), "save_total_limit": ("keep_checkpoints", ""),
    "resume_from_checkpoint": ("resume", ""), "hub_model_id": ("push_to_hub", ""),
}  # fmt: skip
