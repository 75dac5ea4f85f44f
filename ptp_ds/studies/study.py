"""What a study file says: methods x tasks x seeds, each (method, task) a cell whose seeds train as one population."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path
from statistics import mean
from typing import Any

from ptp_ds.config.batch import default_batch, gives_batch
from ptp_ds.config.checks import require_valid
from ptp_ds.config.flags import require_type
from ptp_ds.config.population import VARIED, members_of, seeds_of
from ptp_ds.config.presets import with_preset
from ptp_ds.config.run_config import RunConfig, recorded_settings
from ptp_ds.config.start_text import with_instruction
from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, nearest, plain_name, read_json
from ptp_ds.settings_file import read_settings
from ptp_ds.tasks.template import builtin_templates

_KEYS = ("settings", "seeds", "draws", "tasks", "methods", "baseline")
_OF_A_JOB = ("output_dir", "resume", "seed", "seeds", "population", "config")
_DRAW = "{draw}"


@dataclass(frozen=True)
class Cell:
    """One method on one task. run: what its members share; members: by name, what differs; explicit: named settings."""

    method: str
    task: str
    run: RunConfig
    members: dict[str, dict[str, Any]]
    explicit: frozenset[str]

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method}"

    @property
    def runs(self) -> dict[str, RunConfig]:
        """Each member's settings by its name, with the text that its prompt begins at where --prompt_init is text."""
        return {name: with_instruction(replace(self.run, **own)) for name, own in self.members.items()}

    def folder(self, out: Path) -> Path:
        """Where the cell's population lies below the study's folder."""
        return out / "cells" / self.task / self.method


@dataclass(frozen=True)
class Study:
    """cells: in the file's order, task by task. baseline: the method that the others are compared with."""

    cells: tuple[Cell, ...]
    baseline: str

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(cell.method for cell in self.cells))

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    def part(self, methods: Sequence[str] | None, tasks: Sequence[str] | None) -> "Study":
        """The cells of these methods and tasks alone; UserError for one that the study hasn't."""
        for flag, asked, known in (("--methods", methods, self.methods), ("--tasks", tasks, self.tasks)):
            for name in asked or ():
                if name not in known:
                    raise UserError(f"{flag} {name}: the study has {', '.join(known)}{nearest(name, known)}.")
        cells = [c for c in self.cells if (not methods or c.method in methods) and (not tasks or c.task in tasks)]
        return replace(self, cells=tuple(cells))


@dataclass(frozen=True)
class Row:
    """One prompt's outcome. metrics: of the kept prompt, None for one that failed before it kept any; untrained: those
    of its start. seconds: of its cell's training, steps times their median time; None where there is no result.
    majority: accuracy of always giving the most frequent answer; majority_metrics: all its metrics, None in older runs.
    rows: digests of its rows by what they are for, None in older runs. cross_entropy: of the kept prompt on the rows
    that are reported, in nats a row; None where there is no result.
    """

    task: str
    method: str
    seed: int
    metrics: Mapping[str, float] | None
    untrained: Mapping[str, float]
    majority: float
    failed: str | None
    settings: Mapping[str, Any]
    seconds: float | None
    best_step: int
    steps: int
    majority_metrics: Mapping[str, float] | None = None
    rows: Mapping[str, str] | None = None
    cross_entropy: float | None = None

    @property
    def score(self) -> float | None:
        """The mean of its metrics."""
        return mean(self.metrics.values()) if self.metrics else None

    @property
    def untrained_score(self) -> float:
        """The mean of the start's metrics."""
        return mean(self.untrained.values())

    @property
    def majority_score(self) -> float | None:
        """The mean of the metrics of always giving the most frequent answer; None where an older run doesn't tell."""
        if self.majority_metrics:
            return mean(self.majority_metrics.values())
        return self.majority if self.untrained.keys() == {"accuracy"} else None


def read_study(file: str) -> Study:
    """The study of a JSON or YAML file. Raises UserError for what it can't be."""
    where = f"Study {file}"
    given = read_settings(file, where)
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: expected {', '.join(_KEYS)}; see docs/studies.md.")
    if unknown := next((key for key in given if key not in _KEYS), None):
        raise UserError(f"{where}: unknown key {brief(unknown)}{nearest(unknown, list(_KEYS))}.")
    tasks, methods = (_named(given.get(name), f"{where}: {name}") for name in ("tasks", "methods"))
    common = _settings(given.get("settings", {}), f"{where}: settings")
    seeds = seeds_of(_words(given.get("seeds", "0-9"), f"{where}: seeds"), f"{where}: seeds")
    draws = given.get("draws", [])
    if not isinstance(draws, Sequence) or isinstance(draws, str) or any(isinstance(d, list | dict) for d in draws):
        raise UserError(f"{where}: draws is {brief(draws)}; expected a list of names or numbers.")
    baseline = given.get("baseline", next(iter(methods)))
    if baseline not in methods:
        raise UserError(f"{where}: baseline is {brief(baseline)}; expected one of {', '.join(methods)}.")
    cells = [
        _cell(method, task, (common, own, of_task), seeds, draws, where)
        for task, of_task in tasks.items()
        for method, own in methods.items()
    ]
    return Study(tuple(cells), baseline)


def _words(value: Any, where: str) -> str:
    """Seeds as --seeds takes them: a text, a number, or a list of these."""
    values = value if isinstance(value, list) else [value]
    if not values or any(not isinstance(one, int | str) or isinstance(one, bool) for one in values):
        raise UserError(f"{where} is {brief(value)}; expected seeds such as 0-9 or [0, 1, 2].")
    return " ".join(map(str, values))


def _named(value: Any, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{where} is {brief(value)}; expected names, each with its settings.")
    found = {}
    for name, own in value.items():
        found[plain_name(name, f"{where}: a name")] = _settings(own or {}, f"{where}: {name}")
    return found


def _settings(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {brief(value)}; expected settings of scripts/train.py.")
    for name, one in value.items():
        known = [field for field in RunConfig.__dataclass_fields__ if field not in _OF_A_JOB]
        if name not in known:
            raise UserError(f"{where}: unknown setting {brief(name)}{nearest(name, known)}.")
        require_type(where, name, one)
    return dict(value)


def _merged(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of which later layers win, a layer's preset too, which leaves nothing of an earlier layer's preset."""
    last = max((place for place, layer in enumerate(layers) if "preset" in layer), default=None)
    found: dict[str, Any] = {}
    for place, layer in enumerate(layers):
        found |= with_preset(layer) if place == last else layer
    return found


def _cell(
    method: str, task: str, layers: Sequence[Mapping[str, Any]], seeds: Sequence[int], draws: Sequence[Any], where: str
) -> Cell:
    """The cell whose members are the seeds, each with its draw in the place of {draw}. Without a setting `task` it is
    of the built-in task that has its name. layers: see _merged.
    """
    settings = _merged(layers)
    if "task" not in settings:
        if task not in builtin_templates():
            raise UserError(
                f"{where}: tasks: {task} is no built-in task{nearest(task, builtin_templates())}; say which one it is "
                "of, by `task: NAME` or the path of a template."
            )
        settings = {**settings, "task": task}
    drawn = [name for name, value in settings.items() if isinstance(value, str) and _DRAW in value]
    if drawn and not draws:
        raise UserError(f"{where}: {task}: {drawn[0]} has {_DRAW}, and there are no draws; list them under draws.")
    if fixed := next((name for name in drawn if name not in VARIED), None):
        raise UserError(f"{where}: {task}: {fixed} is the same for all seeds; it can't have {_DRAW}.")
    members = {}
    for place, seed in enumerate(seeds):
        draw = {name: settings[name].replace(_DRAW, str(draws[place % len(draws)])) for name in drawn}
        members[f"seed-{seed}"] = {"seed": seed, **draw}
    try:
        run = RunConfig(**{**settings, **next(iter(members.values()))})
        require_valid(run)
        members_of(run, members)
        cell = Cell(method, task, run, members, frozenset(name for layer in layers for name in layer))
        with_instruction(run)
    except UserError as error:
        raise UserError(f"{where}: {method} on {task}: {error}") from None
    return cell


def with_one_batch(study: Study, out: Path, world: int) -> Study:
    """The study with one batch size in all cells that give none, so that they compare: that of a cell which has begun
    in the folder, else the default, in equal parts for `world` ranks and each cell's micro-batches.
    """
    free = [cell for cell in study.cells if not gives_batch(cell.run, cell.explicit)]
    if not free:
        return study
    batch = next((number for cell in free if (number := _begun_with(cell, out)) is not None), None)
    batch = batch or default_batch(lcm(*(world * cell.run.gradient_accumulation_steps for cell in free)))
    dealt = {
        cell.name: replace(cell, run=replace(cell.run, batch_size=batch), explicit=cell.explicit | {"batch_size"})
        for cell in free
    }
    return replace(study, cells=tuple(dealt.get(cell.name, cell) for cell in study.cells))


def _begun_with(cell: Cell, out: Path) -> int | None:
    """The batch size on record of a cell's first member that has begun."""
    for name in cell.members:
        file = cell.folder(out) / "members" / name / "config.json"
        if is_file(file):
            record = read_json(file, str(file))
            run = record.get("run") if isinstance(record, dict) else None
            found = run.get("batch_size") if isinstance(run, dict) else None
            return found if isinstance(found, int) and found > 0 else None
    return None


def finished(cell: Cell, out: Path) -> bool:
    """Whether the cell has its result; UserError where that is one of other settings than the study file's."""
    record = _record(cell, out)
    if not is_file(record):
        return False
    found = members_on_record(cell, out)
    for name, wanted in cell.runs.items():
        if name not in found:
            raise UserError(f"{record} has no member {name}: it is of another study; give another --output_dir.")
        before = recorded_settings(found[name]["settings"])
        for setting, value in asdict(wanted).items():
            if setting not in _OF_A_JOB and before[setting] != value:
                raise UserError(
                    f"{record} was run with {setting} {brief(before[setting])}, the study says {brief(value)}; "
                    "give another --output_dir, or remove that cell's folder."
                )
    return True


def _record(cell: Cell, out: Path) -> Path:
    return cell.folder(out) / "population.json"


def members_on_record(cell: Cell, out: Path) -> dict[str, dict[str, Any]]:
    """What a finished cell's population.json says of each member, by its name."""
    return {one["name"]: one for one in _members(_record(cell, out))}


def rows_of(cell: Cell, out: Path) -> list[Row]:
    """The outcome of a finished cell's seeds."""
    found = []
    for one in _members(_record(cell, out)):
        if one["name"] not in cell.members:
            continue
        seconds, cross_entropy = _of_result(cell.folder(out) / "members" / one["name"])
        found.append(
            Row(
                task=cell.task, method=cell.method, seed=one["settings"]["seed"], metrics=one["metrics"],
                untrained=one["untrained"], majority=one["majority"], failed=one["failed"], settings=one["settings"],
                seconds=seconds, best_step=one["best_step"], steps=one["steps"],
                majority_metrics=one.get("majority_metrics"), rows=one.get("rows"), cross_entropy=cross_entropy,
            )
        )  # fmt: skip
    return found


def _of_result(member: Path) -> tuple[float | None, float | None]:
    """(steps times their median time, cross-entropy on the reported rows), as the member's result.json has them."""
    file = member / "result.json"
    if not is_file(file):
        return None, None
    result = read_json(file, str(file))
    return result["steps"] * result["step_seconds_median"], result["eval_cross_entropy"]


def _members(record: Path) -> list[dict[str, Any]]:
    value = read_json(record, str(record))
    members = value.get("members") if isinstance(value, dict) else None
    if not isinstance(members, list) or not all(isinstance(one, dict) and "settings" in one for one in members):
        raise UserError(f"{record} can't be read: no record of a population; remove it to run its cell again.")
    return members
