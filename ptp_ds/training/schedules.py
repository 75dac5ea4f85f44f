"""What changes from step to step: the learning rate, and lambda."""

import math

from ptp_ds.config.run_config import RunConfig


def learning_rate(run: RunConfig, step: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then linear or cosine to 0 behind the schedule's
    last step."""
    if step < run.warmup_steps:
        return run.lr * (step + 1) / run.warmup_steps
    if run.lr_schedule == "constant":
        return run.lr
    share = min(1.0, (step - run.warmup_steps) / max(1, run.schedule_end - run.warmup_steps))
    return run.lr * (1 - share if run.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


def reg_weight_at(run: RunConfig, step: int) -> float:
    """lambda in optimizer step `step` (0-based): rises linearly over reg_warmup_steps."""
    return run.reg_weight * min(1.0, (step + 1) / (run.reg_warmup_steps + 1))
