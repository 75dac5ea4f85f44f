"""scripts/overall.py: SuperGLUE's overall score of several runs, a table for each kind of run.

Runs are of one kind where model, perturbation, prompt and all settings agree in which runs of the same task differ;
what is left are seeds. A task's score is the mean of its metrics, averaged over seeds; the overall score is the mean
over the eight tasks' scores. The diagnostics AX-b and AX-g are shown and not counted, as on SuperGLUE's leaderboard.
Everything is a fraction of 1.
"""

import hashlib
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ptp_ds.commands.exits import run_command
from ptp_ds.config.parsers import overall_parser
from ptp_ds.config.run_config import default_warmup, recorded_settings
from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, read_json, require_writable, write_json
from ptp_ds.ranks.log import get_logger
from ptp_ds.training.checkpoint import gone_on

log = get_logger(__name__)
TASKS = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")
_LONGEST = 200  # characters of a name in a table
DIAGNOSTICS = ("AX-b", "AX-g")
_TEXTS = ("task", "model", "perturbation", "prompt", "eval_split")
# Settings that don't make a run another method, each group with its reason.
_NO_METHOD = frozenset({
    # they have a place of their own in a table, or change nothing that is trained or scored
    "seed", "task", "eval_split", "predict_split",
    # where the rows lie: the rows themselves count, by their hash (_DATA)
    "data_dir", "dataset",
    # a run's housekeeping
    "output_dir", "resume", "stall_timeout", "log_every", "save_every", "keep_checkpoints", "report_to", "push_to_hub",
    "hub_visibility",
    # how the same numbers are computed, to rounding
    "ds_config", "nvme_path", "activations", "schedule", "chunk_tokens", "kernels", "gradient_accumulation_steps",
    "eval_tokens",
    # what a preset sets is among the settings
    "preset",
})  # fmt: skip
_DATA = "training_data_sha256"
_WEIGHTS = "weights_gathered"  # as int8 they are another model's, whatever else ds_config says
_VARIANT = "template"  # how a template is called beside its task: pet for RTE.pet
_TEMPLATE = "template_sha256"
_TOLD = "settings"  # whether a result tells its settings: what tells tables apart where only some do


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run's result.json says."""

    folder: str
    task: str
    model: str
    perturbation: str
    prompt: str
    eval_split: str
    seed: int
    metrics: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[str, str, str]:
        """What the runs of one table share at least."""
        return self.model, self.perturbation, self.prompt

    def setting(self, name: str) -> str:
        """A setting as text; "not told" for a result that doesn't say."""
        if name == _TOLD:
            return "told" if self.settings else "not told"
        value = self.settings.get(name, "not told")
        return value if isinstance(value, str) and _is_short(value) else brief(value, 60)

    @property
    def score(self) -> float:
        """Mean of the metrics."""
        return statistics.fmean(self.metrics.values())


def read_result(folder: str) -> Result:
    """The folder's result.json. Raises ValueError where there is none or it lacks what a table needs."""
    file = Path(folder) / "result.json"
    if not is_file(file) and is_file(Path(folder) / "population.json"):
        raise UserError(f"{folder} holds several prompts; give one or more of {Path(folder) / 'members'}/*.")
    if not is_file(file):
        raise UserError(f"{folder} holds no result.json; give the folders of runs that have ended.")
    read = read_json(file, str(file))
    found: dict[str, Any] = read if isinstance(read, dict) else {}
    texts = {name: found[name] for name in _TEXTS if _is_short(found.get(name))}
    metrics: Any = found.get("metrics")
    seed: Any = found.get("seed")
    lacking = [name for name in _TEXTS if name not in texts]
    lacking += [] if isinstance(seed, int) and not isinstance(seed, bool) else ["seed"]
    lacking += [] if _are_numbers(metrics) else ["metrics"]
    if lacking:
        raise UserError(f"{file} has no valid {lacking[0]}; give a file that train.py or evaluate.py --json wrote.")
    if said := gone_on(Path(folder), found.get("steps")):
        log.warning("warning: %s %s", file, said)
    return Result(folder=folder, seed=seed, metrics=metrics, settings=_settings(found, Path(folder)), **texts)


def _settings(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The run's settings, result.json's own or those of config.json beside an older one; the hash of its data, the
    name and the hash of its template, and how its weights were gathered, which config.json tells.

    Those that an older run's version didn't have: see recorded_settings. {} where neither file tells any.
    """
    read = read_json(folder / "config.json", str(folder / "config.json")) if is_file(folder / "config.json") else {}
    config: dict[str, Any] = read if isinstance(read, dict) else {}
    known = result["settings"] if result.get("settings") is not None else config.get("run")
    if not isinstance(known, dict):
        return {}
    found = recorded_settings(known)
    if found["schedule_steps"] == found["max_steps"]:
        found["schedule_steps"] = None  # its default, spelled out
    end = found["schedule_steps"] or found["max_steps"]
    if isinstance(end, int) and found["warmup_steps"] == default_warmup(found["lr_schedule"], end):
        found["warmup_steps"] = None
    digest = result[_DATA] if result.get(_DATA) is not None else config.get(_DATA)
    kept = {name: value for name, value in found.items() if name not in _NO_METHOD}
    resolved = config.get("deepspeed")
    zero = resolved.get("zero_optimization") if isinstance(resolved, dict) else None
    kept[_WEIGHTS] = "as int8" if isinstance(zero, dict) and zero.get("zero_quantized_weights") else "as stored"
    kept |= {_DATA: digest[:8]} if isinstance(digest, str) else {}
    return kept | _template(known.get("task"), result, result.get("template", config.get("task")))


def _template(named: Any, result: Mapping[str, Any], spec: Any) -> dict[str, str]:
    """_VARIANT by what --task named, _TEMPLATE by Task.spec, as far as they are told."""
    found, task = {}, result.get("task")
    if isinstance(named, str):
        path = PurePath(named)
        name = path.stem if path.suffix == ".json" else named
        if name == task:
            found[_VARIANT] = "named as the task"
        elif name.startswith(f"{task}."):
            found[_VARIANT] = name.removeprefix(f"{task}.")
        elif path.suffix == ".json":
            found[_VARIANT] = name
    if isinstance(spec, dict):
        found[_TEMPLATE] = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:8]
    return found


def _is_short(text: Any) -> bool:
    return isinstance(text, str) and text.isprintable() and len(text) <= _LONGEST


def _are_numbers(metrics: Any) -> bool:
    if not isinstance(metrics, dict) or not metrics:
        return False
    return all(isinstance(value, int | float) and -1 <= value <= 1 for value in metrics.values())  # fractions of 1


Runs = dict[str, list[Result]]  # by task


def group_results(results: Iterable[Result]) -> list[tuple[dict[str, str], Runs]]:
    """For each table the settings that tell it from others of its kind, and its runs, in the order given.

    A setting tells tables apart where two runs of the same task and kind differ in it: a task may have settings of its
    own. Raises ValueError where two runs of a table and task share their seed, or differ in their split or metrics.
    """
    results = list(results)
    told = {kind: _differing([one for one in results if one.kind == kind]) for kind in {one.kind for one in results}}
    tables: dict[tuple, tuple[dict[str, str], Runs]] = {}
    for result in results:
        apart = {name: result.setting(name) for name in told[result.kind]}
        _, by_task = tables.setdefault((result.kind, *apart.values()), (apart, {}))
        runs = by_task.setdefault(result.task, [])
        for other in runs:
            _check_alike(other, result)
        runs.append(result)
    return list(tables.values())


def _differing(results: Sequence[Result]) -> list[str]:
    """Names of the settings in which runs of the same task differ; _TOLD where only some of them tell theirs."""
    found = set()
    for task in {result.task for result in results}:
        runs = [result for result in results if result.task == task]
        telling = [result for result in runs if result.settings]
        names = {name for result in telling for name in result.settings}
        found |= {name for name in names - {_VARIANT, _TEMPLATE} if _differ(telling, name)}
        found |= {_TOLD} if 0 < len(telling) < len(runs) else set()
        found |= _templates(telling)
    return sorted(found)


def _differ(results: Iterable[Result], name: str) -> bool:
    return len({result.setting(name) for result in results}) > 1


def _templates(runs: Iterable[Result]) -> set[str]:
    """What tells templates of one task apart: their names, which other tasks' may share, and their hashes only where
    two have one name. A record that lacks either tells nothing apart.
    """
    by_name: dict[str | None, list[Result]] = {}
    for result in runs:
        by_name.setdefault(result.settings.get(_VARIANT), []).append(result)
    found = {_VARIANT} if len(by_name.keys() - {None}) > 1 else set()
    for alike in by_name.values():
        if _differ([result for result in alike if _TEMPLATE in result.settings], _TEMPLATE):
            found.add(_TEMPLATE)
    return found


def _check_alike(one: Result, other: Result) -> None:
    both = f"{one.folder} and {other.folder} both hold {one.task} ({', '.join(one.kind)})"
    if one.seed == other.seed:
        raise UserError(f"{both} with seed {one.seed}; give each seed once.")
    if one.eval_split != other.eval_split:
        raise UserError(
            f"{both} but on splits {one.eval_split!r} and {other.eval_split!r}; give runs on the same split."
        )
    if one.metrics.keys() != other.metrics.keys():
        raise UserError(f"{both} but with different metrics; give runs of the same task template.")


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """mean, and std over seeds: the sample standard deviation (n - 1), None for one seed."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def table_of(settings: Mapping[str, str], runs: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """One table as plain data. overall: the mean over those of the eight tasks that are there, None for none.

    settings: those that tell it from other tables.
    """
    known = (*TASKS, *DIAGNOSTICS)
    ordered = sorted(runs, key=lambda task: known.index(task) if task in known else len(known))
    tasks: dict[str, Any] = {}
    for task in ordered:
        results = sorted(runs[task], key=lambda result: result.seed)
        tasks[task] = {
            "seeds": [result.seed for result in results],
            "score": spread([result.score for result in results]),
            "metrics": {name: spread([result.metrics[name] for result in results]) for name in results[0].metrics},
        }
    present = [task for task in TASKS if task in tasks]
    overall = statistics.fmean(tasks[task]["score"]["mean"] for task in present) if present else None
    first = next(iter(runs.values()))[0]
    return {
        "model": first.model, "perturbation": first.perturbation, "prompt": first.prompt, "settings": dict(settings),
        "tasks": tasks,
        "overall": overall, "missing": [task for task in TASKS if task not in tasks],
    }  # fmt: skip


def _shown(values: Mapping[str, float | None]) -> str:
    deviation = values["std"]
    return f"{values['mean']:.4f}" + ("" if deviation is None else f" +- {deviation:.4f}")


def table_text(table: Mapping[str, Any]) -> str:
    """The table as lines to read: a task a line, the overall score in the last."""
    apart = "".join(f" | {name} {value}" for name, value in table["settings"].items())
    lines = [f"{table['model']} | {table['perturbation']} | {table['prompt']}{apart}"]
    width = max(len(task) for task in table["tasks"])
    for task, found in table["tasks"].items():
        count = len(found["seeds"])
        line = f"  {task:{width}}  {count} seed{'s' if count > 1 else ' '}  score {_shown(found['score']):17}"
        line += "".join(f"  {name} {_shown(values)}" for name, values in found["metrics"].items())
        lines.append(line + ("" if task in TASKS else "  (not in the mean)"))
    missing = table["missing"]
    if table["overall"] is None:
        lines.append("  no overall score: none of SuperGLUE's eight tasks is here")
    elif missing:
        there = len(TASKS) - len(missing)
        lines.append(f"  partial mean of {there} of 8 tasks: {table['overall']:.4f}  (missing: {', '.join(missing)})")
    else:
        lines.append(f"  SuperGLUE score: {table['overall']:.4f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence."""
    return run_command(lambda: _overall(sys.argv[1:] if argv is None else argv, description))


def _overall(argv: Sequence[str], description: str) -> None:
    args = overall_parser(description).parse_args(argv)
    file = require_writable("--json", args.json) if args.json else None
    tables = [table_of(*found) for found in group_results(map(read_result, args.runs))]
    print("\n\n".join(map(table_text, tables)))
    if file is not None:
        write_json(file, tables)
