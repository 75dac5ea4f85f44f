"""--report_to: experiment trackers beside TensorBoard, by accelerate's classes, and the settings that they are told.

accelerate's classes ask its PartialState which process they run in; made without an Accelerator it would read the
launcher's variables, choose a device and, on a CPU, rewrite them. Rank 0 alone makes trackers here, so they are told to
run where they are, and no PartialState comes into being.
"""

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import brief, listed, nearest
from ptp_ds.ranks.log import get_logger
from ptp_ds.redact import redacted

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

log = get_logger(__name__)

TENSORBOARD, NONE = "tensorboard", "none"
TRACKED = (TENSORBOARD, "dvclive")  # each writes a folder of its name in the run's, which a resumed run goes on with
BUILT_IN = (TENSORBOARD, "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")
_EXPECTED = f"one or several of {', '.join(BUILT_IN)}, or none"
PROJECT = "ptp_ds"  # under which a tracker files its runs, where the environment names no other
_PROJECT_VARIABLES = {
    "wandb": "WANDB_PROJECT", "comet_ml": "COMET_PROJECT_NAME", "clearml": "CLEARML_PROJECT",
    "swanlab": "SWANLAB_PROJ_NAME",
}  # fmt: skip
_PACKAGES = {"aim": "'aim<4'"}  # others are installed by the tracker's own name
_NOT_TOLD = ("resume", "report_to")  # how a run is made and watched, not what it is


def report_names(report_to: str) -> tuple[str, ...]:
    """The trackers that --report_to lists, by commas or spaces, each once; none of them for `none`.

    Raises UserError for an empty list, for `none` beside others and for a name that accelerate doesn't know.
    """
    names = tuple(dict.fromkeys(word for word in re.split(r"[,\s]+", report_to) if word))
    if names == (NONE,):
        return ()
    if not names or NONE in names:
        raise UserError(f"--report_to is {report_to!r}; expected {_EXPECTED} alone.")
    for name in names:
        if name not in BUILT_IN and name not in _classes():
            near = nearest(name, [*BUILT_IN, NONE])
            raise UserError(f"--report_to {brief(name)} is no tracker{near}; expected {_EXPECTED}.")
    return names


def of_member(report_to: str) -> str:
    """--report_to for a member of a population: TensorBoard, where it is asked for; the others have one run for all."""
    return TENSORBOARD if TENSORBOARD in report_names(report_to) else NONE


def require_trackers(report_to: str) -> None:
    """UserError where --report_to is no list of trackers (see report_names) or the package of one isn't installed."""
    for name in report_names(report_to):
        if name in BUILT_IN and name != TENSORBOARD and not _is_installed(name):
            raise UserError(
                f"--report_to {name} needs a package that is not installed; pip install {_PACKAGES.get(name, name)}, "
                "or leave it out."
            )


def _is_installed(name: str) -> bool:
    from accelerate.tracking import get_available_trackers

    return name in {str(found) for found in get_available_trackers()}


def _classes() -> "Mapping[str, type[GeneralTracker]]":
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return LOGGER_TYPE_TO_CLASS


def told_settings(run: RunConfig) -> dict[str, bool | int | float | str]:
    """A run's hyper-parameters for a tracker: task, model, perturbation, seed, and each setting that isn't its default.

    Numbers and text alone, as every tracker takes them; secrets are replaced.
    """
    found = {"task": run.task, "model": run.model, "perturbation": run.chosen_perturbation.name, "seed": run.seed}
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        if field.name not in (*found, *_NOT_TOLD) and value != field.default:
            found[field.name] = value if isinstance(value, bool | int | float) else str(value)
    return redacted(found)


def shared_settings(runs: Sequence[RunConfig]) -> dict[str, bool | int | float | str]:
    """told_settings of a population's members as one: what they share, and each one's where they differ."""
    told = [told_settings(run) for run in runs]
    found: dict[str, bool | int | float | str] = {"members": len(runs)}
    for name in dict.fromkeys(name for one in told for name in one):
        values = [one.get(name, getattr(run, name)) for one, run in zip(told, runs, strict=True)]
        found[name] = values[0] if all(value == values[0] for value in values) else listed(values)
    return found


class Trackers:
    """Rank 0's trackers of one run; one that raises is named in a warning, once, and left out from there on."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], continues: bool) -> None:
        """Starts them and tells each the settings. folder: of the run, whose name the run has there.

        continues: whether the run goes on from a checkpoint, under the name that it had.
        """
        self._running: dict[str, GeneralTracker] = {}
        for name in names:
            with self._guarded(name), _alone_with_trackers():
                tracker = _opened(name, folder, continues)
                tracker.start()
                if name == "comet_ml":
                    tracker.tracker.set_name(_name_of(folder))
                tracker.store_init_configuration(dict(settings))
                self._running[name] = tracker

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars by their tags after `step` optimizer steps."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def close(self) -> None:
        """Lets each tracker send what it still holds; safe to call twice."""
        self._each(lambda tracker: tracker.finish())
        self._running.clear()

    def _each(self, call: "Callable[[GeneralTracker], None]") -> None:
        for name, tracker in list(self._running.items()):
            with self._guarded(name), _alone_with_trackers():
                call(tracker)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._running.pop(name, None)
            said = " ".join(str(error).split())[:200]
            log.warning(
                "warning: --report_to %s failed (%s%s); the run goes on without it", name, type(error).__name__,
                f": {said}" if said else "",
            )  # fmt: skip


def _name_of(folder: Path) -> str:
    """A run's name on a tracker: its folder's, so that a resumed run has the same."""
    return str(redacted(folder.resolve().name))


def _opened(name: str, folder: Path, continues: bool) -> "GeneralTracker":
    """A tracker that isn't started yet. One of a program's own is given the run's name, and the folder if it asks."""
    kind, run_name = _classes()[name], _name_of(folder)
    project = os.environ.get(_PROJECT_VARIABLES.get(name, ""), PROJECT)
    where: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "wandb": ((project,), {"name": run_name}),
        "mlflow": ((project,), {"run_name": run_name}),
        "comet_ml": ((project,), {}),
        "aim": ((run_name, str(folder)), {"experiment": project}),
        # its own hooks would record the command line, secrets and all, and TensorBoard's scalars twice
        "clearml": ((project,), {"task_name": os.environ.get("CLEARML_TASK", run_name),
                                 "auto_connect_arg_parser": False, "auto_connect_frameworks": False}),
        "dvclive": ((), {"dir": str(folder / "dvclive"), "resume": continues}),
        "swanlab": ((project,), {"experiment_name": run_name}),
        "trackio": ((project,), {"name": run_name, "resume": "allow" if continues else "never"}),
    }  # fmt: skip
    own = (run_name, str(folder)) if kind.requires_logging_directory else (run_name,)
    arguments, options = where.get(name, (own, {}))
    here = type(kind.__name__, (kind,), {"main_process_only": False})  # no question to PartialState: we are rank 0
    return here(*arguments, **options)


@contextmanager
def _alone_with_trackers() -> Iterator[None]:
    """Inside, accelerate's trackers log without a PartialState, and the command line has no secrets.

    Their logger raises where there is none; several trackers send sys.argv as a run's command.
    """
    from accelerate import tracking

    theirs, argv = tracking.logger, sys.argv
    tracking.logger, sys.argv = _plain_logger(), redacted(argv)
    try:
        yield
    finally:
        tracking.logger, sys.argv = theirs, argv


class _PlainLogger(logging.LoggerAdapter):
    """What accelerate's trackers call: a logger that also warns of a thing once."""

    def __init__(self) -> None:
        super().__init__(logging.getLogger("accelerate.tracking"), {})
        self._heard: set[str] = set()

    def warning_once(self, message: str) -> None:
        """A warning, the first time that it is said."""
        if message not in self._heard:
            self._heard.add(message)
            self.warning(message)


@lru_cache(1)
def _plain_logger() -> Any:
    return _PlainLogger()
