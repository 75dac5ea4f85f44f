"""What a run tells: log.jsonl, TensorBoard, a line a logged step and, on a terminal, a progress bar below the lines."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from ptp_ds.files import lock, parse_json, read_bytes
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import OutputGuard
from ptp_ds.ranks.log import get_logger, is_heard
from ptp_ds.training.trackers import TENSORBOARD, Trackers, report_names

log = get_logger(__name__)
Listener = Callable[[dict[str, Any]], Any]  # a log line: step, kind (train, select, untrained, eval), values by name


class StopRun(Exception):  # noqa: N818 - it is a request
    """Raised by a listener: the run ends behind this step as at its last one, with a prompt that is kept and scored."""


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: allocated memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step_bar(first_step: int, last_step: int) -> Any:
    """A progress bar over optimizer steps on standard error, or in a notebook.

    None where that is no terminal, and where nobody hears the package's lines.
    """
    if not is_heard() or not (sys.stderr.isatty() or in_notebook()):
        return None
    from tqdm.auto import tqdm

    return tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True)


def open_board(folder: Path, first_step: int) -> Any:
    """TensorBoard's writer under `folder`; what an interrupted run wrote past first_step is hidden (0: all)."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / TENSORBOARD), purge_step=first_step + 1 if first_step else 0)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return shell is not None and hasattr(shell, "kernel")


class Monitor:
    """Rank 0's records under output_dir; on other ranks every call does nothing.

    speaks: whether there are lines and a bar on the console. listeners: called with every line of log.jsonl; what else
    than StopRun one raises passes as it is. report_to: the flag; settings: of the run, for trackers. latest: the values
    of the last logged step. stop_asked: whether a listener has raised StopRun. A record is written by the guard
    `output` of its call.
    """

    def __init__(
        self, output_dir: Path, ranks: Ranks, first_step: int, last_step: int, speaks: bool = True,
        listeners: Sequence[Listener] = (), report_to: str = TENSORBOARD, settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.ranks, self.first_step, self.last_step, self.speaks = ranks, first_step, last_step, speaks
        self.listeners, self.stop_asked = tuple(listeners), False
        self.latest: dict[str, float] = {}
        self.started = time.perf_counter()
        self._log: TextIO | None = None
        self._bar: Any = None
        self._board: Any = None
        if not ranks.is_main:
            return
        names, self._settings = report_names(report_to), dict(settings or {})
        if TENSORBOARD in names:
            self._board = open_board(output_dir, first_step)
        others = [name for name in names if name != TENSORBOARD]
        self._trackers = Trackers(others, output_dir, self._settings, continues=first_step > 0)
        self._log = _open_log(output_dir / "log.jsonl", first_step)
        if speaks:
            self._bar = step_bar(first_step, last_step)

    def train(self, step: int, values: dict[str, float], output: OutputGuard) -> None:
        """A logged train step: values by scalar name, e.g. loss, divergence, learning_rate."""
        self.latest = values  # before the record, which a full disk may refuse: a population reads it behind
        self._record("train", step, values, output)
        if not self.ranks.is_main or not self.speaks:
            return
        left = (self.last_step - step) * values["step_seconds"]
        log.info(
            "step %d/%d  loss %.4f  ce %.4f  div %.5f  grad %.3f  lr %.2e  %.2f s/step  %.0f tok/s  %.0f s left",
            step, self.last_step, values["loss"], values["cross_entropy"], values["divergence"], values["grad_norm"],
            values["learning_rate"], values["step_seconds"], values["tokens_per_second"], left,
        )  # fmt: skip

    def evaluation(self, step: int, split: str, values: dict[str, float], output: OutputGuard) -> None:
        """Metrics of `split` after `step` optimizer steps."""
        self._record(split, step, values, output)

    def _record(self, group: str, step: int, values: dict[str, float], output: OutputGuard) -> None:
        """Writes the line, and tells listeners of one that is written."""
        if self._log is None:
            return
        with output.writing():
            self._write(self._log, group, step, values)
        if output.failed:
            return
        for listener in self.listeners:
            try:
                listener({"step": step, "kind": group, **values})
            except StopRun:
                self.stop_asked = True

    def _write(self, log: TextIO, group: str, step: int, values: dict[str, float]) -> None:
        log.write(json.dumps({"step": step, "kind": group, **values}) + "\n")
        log.flush()
        # a2t/... has a group of its own
        tagged = {name if "/" in name else f"{group}/{name}": value for name, value in values.items()}
        self._trackers.log(tagged, step)
        if self._board is None:
            return
        for tag, value in tagged.items():
            self._board.add_scalar(tag, value, step)
        self._board.flush()

    def conclude(self, step: int, metrics: dict[str, float]) -> None:
        """The run's settings beside its last metrics, for TensorBoard's page of hyper-parameters."""
        if self._log is not None and self._board is not None:
            scores = {f"hparam/{name}": value for name, value in metrics.items()}
            self._board.add_hparams(self._settings, scores, run_name=".", global_step=step)

    def tick(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Flushes and closes everything; safe to call twice."""
        if self._bar is not None:
            self._bar.close()
        if self._log is not None:
            self._log.close()
            self._trackers.close()
            if self._board is not None:
                self._board.close()
            self._log = None


def _open_log(path: Path, first_step: int) -> TextIO:
    """log.jsonl for appending, without lines after `first_step` that an interrupted run wrote past its checkpoint (0:
    empty).
    """
    kept = []
    if path.is_file():
        for line in read_bytes(path, str(path), most=None).decode("utf-8", "replace").splitlines():
            try:
                if parse_json(line, str(path))["step"] <= first_step and first_step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # a line cut off by a kill
    work = path.with_name(f".{path.name}.writing")
    work.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    work.replace(path)
    log = path.open("a", encoding="utf-8")
    lock(log)
    return log
