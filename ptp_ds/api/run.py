"""ptp_ds.train: one run, or several prompts at once, from a Python program or a notebook."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

from ptp_ds.api.data import read_task, require_unchanged, rows_by_split, task_file, write_rows
from ptp_ds.api.manners import as_it_was
from ptp_ds.commands.train import train as train_on_ranks
from ptp_ds.config.checks import require_valid
from ptp_ds.config.flags import read_config, require_type
from ptp_ds.config.population import is_population
from ptp_ds.config.presets import with_preset
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_folder, nearest, read_json
from ptp_ds.ranks.distributed import env_world
from ptp_ds.training.continuation import checked_output_dir
from ptp_ds.training.monitor import StopRun

__all__ = ["Result", "StopRun", "train"]
Callback = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Result:
    """What a run leaves. output_dir: its folder. record: result.json, or population.json of several prompts.

    metrics: of the kept prompt on the reported split; untrained: of the prompt that training began with. Of several
    prompts both are means over `members`, by name.
    """

    output_dir: Path
    record: Mapping[str, Any]

    @property
    def members(self) -> "dict[str, Result]":
        """Each prompt's own result, where several were trained; those that kept none are left out."""
        found = {}
        for one in self.record.get("members", []):
            folder = self.output_dir / "members" / one["name"]
            if one["metrics"]:
                found[one["name"]] = Result(folder, _read(folder / "result.json"))
        return found

    @property
    def metrics(self) -> dict[str, float]:
        """By name, fractions of 1."""
        return self._values("metrics")

    @property
    def untrained(self) -> dict[str, float]:
        """As metrics, before training."""
        return self._values("untrained")

    @property
    def adapter(self) -> Path:
        """The adapter's folder, in peft's format. UserError where there are several."""
        if "members" in self.record:
            raise UserError(f"{self.output_dir} holds several adapters; take one of .members, such as "
                            f".members[{next(iter(self.members), '')!r}].adapter.")  # fmt: skip
        return self.output_dir / "adapter"

    def _values(self, kind: str) -> dict[str, float]:
        if "members" not in self.record:
            return dict(self.record[kind])
        of_each = [getattr(one, kind) for one in self.members.values()]
        return {name: mean(one[name] for one in of_each) for name in (of_each[0] if of_each else {})}


def train(
    config: RunConfig | str | Path | None = None, *, data: Any = None, task: Any = None,
    callbacks: Sequence[Callback] | None = (), verbose: bool = True, **settings: Any,
) -> Result:  # fmt: skip
    """Trains a prompt, or with `seeds` or `population` several at once, and returns what it leaves.

    config: a RunConfig, or a file as for --config. settings: those of `ptp train`, without dashes; they win over it.
    data: a folder as for --data_dir, a file of rows, a list of dicts, a datasets.Dataset, a pandas.DataFrame, or a dict
    of these by split; rows are written below output_dir, so that the run can be resumed and evaluated. task: a name, a
    template's path, or a template as a dict. callbacks: called on rank 0 with every line of the log, a dict with `step`
    and `kind`; one that raises StopRun ends the run as its last step would. verbose: whether its lines are printed.

    Ctrl-C saves and raises KeyboardInterrupt; with `resume="auto"` the run goes on. Signals, environment variables and
    the number of threads that it sets are the caller's own again behind it. Raises UserError, one sentence, for what is
    wrong.
    """
    with as_it_was(verbose):
        told = _called(callbacks)
        run, explicit = _settings(config, task, settings)
        run = _with_data(run, data, task)
        code = train_on_ranks(run, explicit, told)
        if code:
            raise KeyboardInterrupt(f"stopped by signal {code - 128}; saved: resume='auto' goes on")
        folder = Path(run.output_dir or "")
        return Result(folder, _read(folder / ("population.json" if is_population(run) else "result.json")))


def _called(callbacks: Any) -> tuple[Callback, ...]:
    """The callbacks; none for None."""
    if callbacks is None:
        return ()
    found = tuple(callbacks) if isinstance(callbacks, Iterable) else (None,)
    if not all(map(callable, found)):
        raise UserError(f"callbacks is {brief(callbacks)}; expected a list of functions, each called with a line.")
    return found


def _settings(config: Any, task: Any, settings: Mapping[str, Any]) -> tuple[RunConfig, set[str]]:
    """The run, its data still to come, and the names of what was given."""
    known = [field.name for field in fields(RunConfig)]
    given: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"train() has no setting {name!r}{nearest(name, known)}; see `ptp train --help`.")
        given[name] = _plain(name, value)
        require_type("train()", name, given[name])
    if isinstance(config, RunConfig):  # one that has its default is as one that wasn't given
        held = {n: getattr(config, n) for n in known if getattr(config, n) != getattr(RunConfig(), n)}
    else:
        held = {} if config is None else read_config(str(config))
    explicit, run = set(held), RunConfig(**with_preset({**held, **given}))
    if isinstance(task, str | Path):
        run, explicit = replace(run, task=str(task)), explicit | {"task"}
    require_valid(run)
    return run, explicit | set(given)


def _plain(name: str, value: Any) -> Any:
    """A setting as a command line has it: paths, lists of seeds and a perturbation's arguments as text."""
    if isinstance(value, Path):
        return str(value)
    if name == "seeds" and isinstance(value, range | list | tuple):
        return " ".join(map(str, value))
    if name == "perturbation_args" and isinstance(value, Mapping):
        return " ".join(f"{key}={each}" for key, each in value.items())
    return value


def _with_data(run: RunConfig, data: Any, task: Any) -> RunConfig:
    """The run with an output folder, and with task and data that stand in files."""
    if run.output_dir is None:
        if env_world() > 1:
            raise UserError("train() on several ranks needs output_dir: each would name a folder by its own clock.")
        stem = Path(run.task).stem if isinstance(task, str | None) else "task"
        what = f"{'population' if is_population(run) else stem}-{run.chosen_perturbation.name}"
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run = replace(run, output_dir=f"runs/{what}-{run.seed}-{stamp}")
    folder = Path(run.output_dir or "")
    if data is not None and (run.data_dir is not None or run.dataset is not None):
        raise UserError("train() takes data, data_dir or dataset, one of them.")
    checked_output_dir(run, is_population(run))
    named = read_task(run.task if task is None else task)
    in_memory = data is not None and not (isinstance(data, str | Path) and is_folder(data))
    rows = rows_by_split(data, named, (run.train_split, run.eval_split), run.seed) if in_memory else {}
    require_unchanged(task, named, rows, folder)
    if task is not None:  # nothing is written before all is read
        run = replace(run, task=task_file(task, folder))
    if data is not None:
        run = replace(run, data_dir=write_rows(rows, named, folder) if in_memory else str(data))
    return run


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(file, str(file))
    return found
