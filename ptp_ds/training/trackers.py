"""Trackers beside TensorBoard (wandb, mlflow, ...): a run's settings and scalars, by accelerate's classes for them.

A tracker is a guest: it is looked for before a run starts, and one that fails while a run goes on is left out, with a
warning, since the run's own records lie in its folder.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief
from ptp_ds.ranks.log import get_logger
from ptp_ds.redact import redacted

log = get_logger(__name__)
TENSORBOARD = "tensorboard"


def trackers_of(text: str) -> tuple[str, ...]:
    """The names in --report_to, each once, without `none`; ptp_ds.config.checks has looked at them."""
    return tuple(dict.fromkeys(name for name in text.replace(",", " ").split() if name != "none"))


def require_installed(text: str) -> None:
    """UserError for a tracker in --report_to whose package isn't here."""
    for name in trackers_of(text):
        if importlib.util.find_spec(name) is None and name != TENSORBOARD:
            raise UserError(f"--report_to {name} needs its package: run `pip install {name}`, or leave it out.")


class Trackers:
    """The trackers of one run, on rank 0. settings: what is known of the run at its start, sent without secrets."""

    def __init__(self, text: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._open: dict[str, Any] = {}
        names = [name for name in trackers_of(text) if name != TENSORBOARD]
        if not names:
            return
        from accelerate import tracking

        tracking.logger = logging.getLogger(
            tracking.__name__
        )  # accelerate's own wants its process state, ours is another
        known = {str(getattr(key, "value", key)): kind for key, kind in tracking.LOGGER_TYPE_TO_CLASS.items()}
        told = {name: plain(value) for name, value in redacted(dict(settings)).items()}
        for name in names:
            self._try(name, partial(self._start, name, known[name], folder, told))

    def _start(self, name: str, kind: Any, folder: Path, settings: Mapping[str, Any]) -> None:
        """Opens one. Its methods would ask accelerate's process state for the main process: this is it."""
        own: Any = type(kind.__name__, (kind,), {"main_process_only": False})
        arguments = [folder.name, str(folder)] if own.requires_logging_directory else [folder.name]
        tracker = own(*arguments)
        if hasattr(tracker, "start"):
            tracker.start()
        self._open[name] = tracker
        tracker.store_init_configuration(dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars by name, behind optimizer step `step`."""
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, dict(values), step=step))

    def finish(self) -> None:
        """Ends all of them; safe to call twice."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.finish)
        self._open = {}

    def _try(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # each tracker has types of its own; none is worth a run
            self._open.pop(name, None)
            log.warning("warning: tracker %s is left out: %s", name, brief(str(error) or type(error).__name__)[1:-1])


def plain(value: Any) -> Any:
    """What every tracker takes."""
    return value if isinstance(value, bool | int | float | str) else str(value)
