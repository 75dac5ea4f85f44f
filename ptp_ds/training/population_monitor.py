"""What a population tells as a whole: lines and a progress bar on the console, means with their band in TensorBoard."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.log import get_logger
from ptp_ds.training.evaluate import Evaluation
from ptp_ds.training.monitor import open_board, step_bar
from ptp_ds.training.trackers import TENSORBOARD, Trackers, report_names

log = get_logger(__name__)
_BANDS = {
    "train": ("loss", "cross_entropy", "divergence", "grad_norm"),
    "select": ("score", "cross_entropy"),
    "eval": ("score", "cross_entropy"),
}


class PopulationMonitor:
    """Rank 0's records of all members; on other ranks every call does nothing.

    TensorBoard, under folder/tensorboard: `members/<group>/<value>/mean`, `low` and `high`, one standard deviation
    apart, which the custom scalars' page shows as a band; members/alive. Each member's own scalars lie in its folder.
    Other trackers get the same, in one run for all members: most of them have one at a time in a process.
    report_to: see RunConfig. settings: what they are told of the run (trackers.told_settings).
    """

    def __init__(
        self, folder: Path, ranks: Ranks, first_step: int, last_step: int, report_to: str = TENSORBOARD,
        settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._board: Any = None
        self._trackers: Trackers | None = None
        self._bar: Any = None
        self.last_step, self._loss = last_step, math.nan
        if not ranks.is_main:
            return
        names = report_names(report_to)
        if TENSORBOARD in names:
            self._board = open_board(folder, first_step)
            self._board.add_custom_scalars(_layout())
        others = [name for name in names if name != TENSORBOARD]
        self._trackers = Trackers(others, folder, settings or {}, continues=first_step > 0)
        self._bar = step_bar(first_step, last_step)

    def tick(self, step: int, alive: int) -> None:
        """Moves the progress bar to `step`; it shows how many members train and their latest mean loss."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{alive} members, loss {self._loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def train(self, step: int, values: Sequence[Mapping[str, float]]) -> None:
        """A logged train step: each training member's values by scalar name (see Monitor.train)."""
        if self._trackers is None or not values:
            return
        losses, seconds = [one["loss"] for one in values], values[0]["step_seconds"]
        self._loss = mean(losses)
        log.info(
            "step %d/%d  %d members  loss %.4f (%.4f to %.4f)  %.2f s/step  %.0f s left", step, self.last_step,
            len(values), self._loss, min(losses), max(losses), seconds, (self.last_step - step) * seconds,
        )  # fmt: skip
        bands = {f"members/train/{name}": [one[name] for one in values] for name in _BANDS["train"]}
        self._record(step, {**_edges(bands), "members/alive": len(values)})

    def evaluation(self, step: int, split: str, results: Sequence[Evaluation]) -> None:
        """Each member's scores on `split` behind `step` optimizer steps."""
        if self._trackers is None or not results:
            return
        scores, entropies = [one.score for one in results], [one.cross_entropy for one in results]
        bands = {f"members/{split}/score": scores, f"members/{split}/cross_entropy": entropies}
        self._record(step, _edges(bands))

    def selected(self, step: int, kept: Sequence[float]) -> None:
        """kept: selection scores of the prompts that members keep."""
        if kept:
            log.info(
                "step %d  selection rows, prompts that are kept: score %.3f (%.3f to %.3f)", step, mean(kept),
                min(kept), max(kept),
            )  # fmt: skip

    def ended(self, step: int, by_patience: Sequence[str], by_callback: Sequence[str]) -> None:
        """Members that train no more behind `step`."""
        if by_patience and step < self.last_step:
            names = ", ".join(by_patience)
            log.info("step %d  without a higher score for --patience evaluations, ended: %s", step, names)
        if by_callback and step < self.last_step:
            log.info("step %d  by a callback, ended: %s", step, ", ".join(by_callback))

    def close(self) -> None:
        """Flushes and closes everything; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        if self._board is not None:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)
            self._board.flush()
        if self._trackers is not None:
            self._trackers.log(values, step)


def _edges(bands: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean of each band's values, and one standard deviation below and above it."""
    found: dict[str, float] = {}
    for tag, values in bands.items():
        middle, spread = mean(values), stdev(values) if len(values) > 1 else 0.0
        found |= {f"{tag}/mean": middle, f"{tag}/low": middle - spread, f"{tag}/high": middle + spread}
    return found


def _layout() -> dict[str, dict[str, list[Any]]]:
    """The custom scalars' page: a chart with a band for each value."""
    return {
        "all members: mean and standard deviation": {
            f"{group} {name}": ["Margin", [f"members/{group}/{name}/{part}" for part in ("mean", "low", "high")]]
            for group, names in _BANDS.items()
            for name in names
        }
    }
