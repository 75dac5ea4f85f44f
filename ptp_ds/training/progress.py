"""How far a run is: its steps, and the prompt to keep; as a checkpoint recorded it."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ptp_ds.training.carried import Carried
from ptp_ds.training.checkpoint import Checkpoint
from ptp_ds.training.evaluate import Evaluation


@dataclass
class Progress:
    """What changes while training: optimizer steps done, timings of logged steps, and the prompt to keep.

    best, best_prompt, best_step: the latest evaluation within one standard error of the highest score; highest: that;
    stale: evaluations since it rose. ended: whether a listener has ended the run. scored: whether the checkpoint that
    it goes on from was a run's end, and so evaluated.
    """

    step: int = 0
    best: Evaluation | None = None
    best_prompt: Tensor | None = None
    best_step: int = 0
    highest: float = -math.inf
    stale: int = 0
    step_seconds: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)
    stopped_by: int = 0
    ended: bool = False
    scored: bool = False
    carried: Carried | None = None


def progress_from(checkpoint: Checkpoint) -> Progress:
    """The progress that a checkpoint recorded."""
    scored = checkpoint.ended or checkpoint.identity.get("max_steps") == checkpoint.step
    progress = Progress(step=checkpoint.step, scored=scored)
    if checkpoint.carried or "carried_delta" in checkpoint.tensors:
        progress.carried = Carried(files=tuple(checkpoint.carried), whole=checkpoint.tensors.get("carried_delta"))
    if checkpoint.best is not None:
        progress.best = Evaluation(**checkpoint.best["evaluation"])
        progress.best_step = int(checkpoint.best["step"])
        progress.best_prompt = checkpoint.tensors["best_prompt"]
        progress.highest = float(checkpoint.best.get("highest", progress.best.score))  # before it, best was highest
        progress.stale = int(checkpoint.best.get("stale", 0))
    return progress


def median_or_zero(values: Sequence[float]) -> float:
    """The median, 0.0 where nothing was timed (a resumed run that had no step left)."""
    return statistics.median(values) if values else 0.0
