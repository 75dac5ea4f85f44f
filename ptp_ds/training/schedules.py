"""What changes from step to step: the learning rate, and lambda."""

import math

from ptp_ds.config.run_config import RunConfig


def learning_rate(run: RunConfig, step: int) -> float:
    """The rate of optimizer step `step` (0-based): linear warm-up, then linear or cosine to 0 behind the schedule's
    last step."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    if run.lr_schedule == "constant":
        return run.lr
    return run.lr * _left(run.lr_schedule, step - run.warmup, run.schedule_end - run.warmup)


def reg_weight_at(run: RunConfig, step: int) -> float:
    """lambda in optimizer step `step` (0-based): rises linearly over reg_warmup_steps, then stays, or falls to 0 behind
    the schedule's last step."""
    if step < run.reg_warmup_steps:
        return run.reg_weight * (step + 1) / (run.reg_warmup_steps + 1)
    if run.reg_schedule == "constant":
        return run.reg_weight
    begin = run.reg_warmup_steps
    return run.reg_weight * _left(run.reg_schedule, step - begin, run.schedule_end - begin)


def _left(schedule: str, done: int, steps: int) -> float:
    """What is left of the whole, behind `done` steps of a decay over `steps`."""
    share = min(1.0, done / max(1, steps))
    return 1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
