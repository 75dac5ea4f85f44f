"""How far a run is: its steps, and the prompt to keep; as a checkpoint recorded it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ptp_ds.training.carried import Carried
from ptp_ds.training.checkpoint import Checkpoint
from ptp_ds.training.evaluate import Evaluation


@dataclass
class Progress:
    """What changes while training: optimizer steps done, timings of logged steps, and the prompt to keep.

    best, best_prompt, best_step: the latest evaluation within one standard error of the highest score; highest: that;
    stale: evaluations since it rose. ended: whether a listener has ended the run. scored: the newest step that was
    evaluated, 0 for none; None where it goes on from an older checkpoint, which doesn't say.
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
    scored: int | None = 0
    carried: Carried | None = None

    def best_record(self) -> dict[str, Any] | None:
        """What is written of the prompt to keep, beside itself; see Checkpoint."""
        if self.best is None:
            return None
        scores = self.best.as_dict()
        return {"step": self.best_step, "evaluation": scores, "highest": self.highest, "stale": self.stale}

    def keep(self, record: Mapping[str, Any], prompt: Tensor) -> None:
        """The prompt to keep, as best_record has told it; older ones lack highest and stale."""
        self.best, self.best_prompt = Evaluation(**record["evaluation"]), prompt
        self.best_step, self.stale = int(record["step"]), int(record.get("stale", 0))
        self.highest = float(record.get("highest", self.best.score))  # before it, best was highest


def progress_from(checkpoint: Checkpoint) -> Progress:
    """The progress that a checkpoint recorded."""
    progress = Progress(step=checkpoint.step, scored=_scored(checkpoint))
    if checkpoint.carried or "carried_delta" in checkpoint.tensors:
        progress.carried = Carried(files=tuple(checkpoint.carried), whole=checkpoint.tensors.get("carried_delta"))
    if checkpoint.best is not None:
        progress.keep(checkpoint.best, checkpoint.tensors["best_prompt"])
    return progress


def _scored(checkpoint: Checkpoint) -> int | None:
    """Progress.scored; an older checkpoint tells it where it is a run's end."""
    if checkpoint.scored is None:
        ends = checkpoint.ended or checkpoint.identity.get("max_steps") == checkpoint.step
        return checkpoint.step if ends else None
    return checkpoint.step if checkpoint.scored else 0


def median_or_zero(values: Sequence[float]) -> float:
    """The median, 0.0 where nothing was timed (a resumed run that had no step left)."""
    return statistics.median(values) if values else 0.0
