"""scripts/train.py --seeds or --population: several prompts in one job, and the table over them."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from ptp_ds.adapters.record import versions
from ptp_ds.commands.introduction import introduction
from ptp_ds.commands.members import Changes, errors_of_member, failure_of, goes_on, prepare_population
from ptp_ds.commands.one_run import (
    open_output,
    open_trainer,
    record_untrained,
    report_run,
    write_predictions,
)
from ptp_ds.config.run_config import RunConfig
from ptp_ds.files import write_json
from ptp_ds.prompts import empty_prompts, prompt_width
from ptp_ds.ranks.distributed import Ranks, env_rank, is_launched, start_processes, stop_processes
from ptp_ds.ranks.faults import OutputGuard
from ptp_ds.ranks.log import get_logger
from ptp_ds.ranks.signals import ignore_stop_signals
from ptp_ds.ranks.watchdog import Watchdog
from ptp_ds.training.checkpoint import Checkpoint
from ptp_ds.training.engine import AVERAGE, MOMENTS
from ptp_ds.training.evaluate import Evaluation, majority_metrics
from ptp_ds.training.failed import forget_failure, take_failure
from ptp_ds.training.fingerprints import fingerprints, require_agreement
from ptp_ds.training.meter import Meter
from ptp_ds.training.monitor import Listener
from ptp_ds.training.population import Member, PopulationTrainer, member_engine
from ptp_ds.training.population_engine import PopulationEngine
from ptp_ds.training.population_monitor import PopulationMonitor
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.progress import Progress, progress_from
from ptp_ds.training.start import (
    initial_trained,
    made_from,
    open_backbone,
    perturbation_unit,
    require_served_rows,
)
from ptp_ds.training.trackers import TENSORBOARD, report_names, shared_settings
from ptp_ds.training.trainer import NonFiniteLossError

log = get_logger(__name__)


def train_population(
    run: RunConfig, explicit: Collection[str] = (), changes: Changes | None = None, listeners: Sequence[Listener] = ()
) -> int:
    """All members on the ranks that this process is one of; returns the exit code. Raises UserError (see prepare).

    changes: see prepare_population. listeners: see ptp_ds.commands.train; a line names its `member`, and StopRun ends
    that one.
    """
    alone = not is_launched()
    members = {
        name: replace(one, listeners=tuple(_of_member(name, listener) for listener in listeners))
        for name, one in prepare_population(run, explicit, changes).items()
    }
    watchdog = Watchdog(run.stall_timeout, env_rank())
    try:
        ranks = start_processes()
        require_agreement(ranks, _seen(members))
        folder = Path(run.output_dir) if run.output_dir is not None else _named(run, ranks)
        members = {
            name: replace(one, output_dir=folder / "members" / name) if one.output_dir is None else one
            for name, one in members.items()
        }
        return _train(members, ranks, watchdog, folder)
    finally:
        watchdog.stop()
        if alone:
            stop_processes()


def _of_member(name: str, listener: Listener) -> Listener:
    return lambda line: listener({"member": name, **line})


def _seen(members: Mapping[str, Prepared]) -> dict[str, str]:
    """What all ranks must see alike, of every member."""
    return {
        f"{what} of member {name}": text
        for name, one in members.items()
        for what, text in fingerprints(
            one.digests, one.source.folder, one.continuation.checkpoint, one.identity, one.resolved.dtype
        ).items()
    }


def _named(run: RunConfig, ranks: Ranks) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(ranks.from_main(int(time.time()))))
    return Path("runs") / f"population-{run.chosen_perturbation.name}-{stamp}"


def _train(members: Mapping[str, Prepared], ranks: Ranks, watchdog: Watchdog, folder: Path) -> int:
    first = next(iter(members.values()))
    log.info("%d members, the first of them:", len(members))
    for line in introduction(first, ranks):
        log.info("%s", line)
    is_new = all(one.continuation.checkpoint is None for one in members.values())
    for one in members.values():
        output = OutputGuard(ranks, _folder(one))
        # what failed before may have had other settings, or has gone on alone since
        if ranks.is_main and (is_new or not failure_of(one)):
            with output.writing():
                forget_failure(_folder(one))
        open_output(one, ranks, output, stays=ranks.is_main and bool(failure_of(one)))
    trainer = _open(members, ranks, watchdog, folder)
    log.info("  output: %s", folder)
    if step := _step_behind(trainer.members):
        log.info("resumed behind step %d", step)
    results: dict[str, Evaluation] = {}
    output = OutputGuard(ranks, folder)
    try:
        untrained = _score_untrained(trainer)
        stopped = trainer.train()
        if stopped:
            ignore_stop_signals()
            log.info("stopped by signal %d; saved: --resume auto goes on", stopped)
            return 128 + stopped
        results = _report(trainer, untrained)
    finally:
        with output.writing():
            trainer.monitor.close()
            for member in trainer.members:
                member.trainer.monitor.close()
    output.agree()
    _conclude(trainer, untrained, results, ranks, folder)
    return 0


def _score_untrained(trainer: PopulationTrainer) -> dict[str, Evaluation]:
    """one_run.score_untrained of every member, by name, in shared passes."""
    trainer.watchdog.doing("scoring the untrained prompts")
    starts, members = [], trainer.members
    for member in members:
        member.serve()
        starts.append(initial_trained(member.prepared, trainer.engine.backbone))
    results = trainer.evaluate(members, starts, [member.prepared.examples.evaluation for member in members])
    for member, result in zip(members, results, strict=True):
        record_untrained(member.trainer, member.progress, result)
    log.info("  untrained prompts: score %.3f", mean(result.score for result in results))
    return {member.name: result for member, result in zip(members, results, strict=True)}


def _report(trainer: PopulationTrainer, untrained: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """Every member that keeps a prompt: its scores on --eval_split, its files and predictions."""
    trainer.watchdog.doing("the last evaluation")
    members = [member for member in trainer.members if member.progress.best_prompt is not None]
    if not members:
        return {}
    best = [_best(member) for member in members]
    results = trainer.evaluate(members, best, [member.prepared.examples.evaluation for member in members])
    found, step = {}, max(member.progress.step for member in members)
    for member, result in zip(members, results, strict=True):
        member.serve()
        try:
            report_run(member.prepared, member.trainer, member.progress, result, untrained[member.name])
            found[member.name] = result
        except NonFiniteLossError as error:
            _drop(trainer, member, error)
    members = [member for member in members if member.name in found]
    trainer.monitor.evaluation(step, "eval", list(found.values()))
    asked = [member for member in members if member.prepared.examples.predict_split is not None]
    scores = trainer.scores(asked, [_best(m) for m in asked], [m.prepared.examples.predict for m in asked])
    for member, scores_NC in zip(asked, scores, strict=True):
        write_predictions(member.prepared, member.trainer, scores_NC)
    return found


def _drop(trainer: PopulationTrainer, member: Member, error: NonFiniteLossError) -> None:
    """The member fails at the last evaluation, and the prompt that it kept is no result."""
    output = OutputGuard(trainer.ranks, _folder(member.prepared))
    member.progress.best = member.progress.best_prompt = None
    trainer.fail(member, error, output)
    output.agree()


def _best(member: Member) -> Tensor:
    assert member.progress.best_prompt is not None
    return member.progress.best_prompt


def _folder(prepared: Prepared) -> Path:
    assert prepared.output_dir is not None
    return prepared.output_dir


def _open(members: Mapping[str, Prepared], ranks: Ranks, watchdog: Watchdog, folder: Path) -> PopulationTrainer:
    """Backbone, engine with every member's start or state, and a Trainer for each."""
    prepared = list(members.values())
    longest = max(prepared, key=lambda one: one.run.prompt_length + one.examples.longest)
    backbone = open_backbone(longest, ranks)
    for name, one in members.items():
        with errors_of_member(name):
            require_served_rows(one, backbone, ranks)
    run, config = prepared[0].run, prepared[0].source.config
    beside, lengths = backbone.head.rows(prompt_width(run.prompt, config)), [one.run.prompt_length for one in prepared]
    weight, rows = empty_prompts(run.prompt, config, lengths, [made_from(one) for one in prepared], beside)
    engine = PopulationEngine(
        weight, backbone, prepared[0].resolved, ranks, rows, run.weight_decay, run.average,
        [length + beside for length in lengths],
    )  # fmt: skip
    saved = [one.continuation.checkpoint for one in prepared]
    _load(engine, prepared, saved)
    found: list[Member] = []
    for number, (name, one) in enumerate(members.items()):
        checkpoint = saved[number]
        progress = Progress() if checkpoint is None else progress_from(checkpoint)
        progress.ended = checkpoint is not None and checkpoint.ended
        if failed := failure_of(one):
            take_failure(progress, _folder(one), one.identity)
        unit = found[0].trainer.settings.unit if found else perturbation_unit(one, backbone)
        output = OutputGuard(ranks, _folder(one))
        trainer = open_trainer(one, member_engine(engine, number), progress, unit, output, watchdog, speaks=False)
        found.append(Member(name, one, trainer, progress, Meter(ranks), failed))
    output = OutputGuard(ranks, folder)
    with output.writing():
        settings = shared_settings([one.run for one in prepared])
        monitor = PopulationMonitor(folder, ranks, _step_behind(found), run.max_steps, run.report_to, settings)
    output.agree()
    return PopulationTrainer(
        engine=engine, members=found, ranks=ranks, watchdog=watchdog, monitor=monitor, output=output
    )


def _step_behind(members: Sequence[Member]) -> int:
    """The step that the job goes on behind: that of the members that train, the newest where none has steps left."""
    newest = max(member.progress.step for member in members)
    return max((member.progress.step for member in members if member.trains), default=newest)


def _load(engine: PopulationEngine, prepared: Sequence[Prepared], saved: Sequence[Checkpoint | None]) -> None:
    """Each member's state, or where it starts: for the job's start, and for one that failed before it saved any.

    Adam's count of steps is that of the members that go on: one that had ended may have saved a later step.
    """
    parts = []
    for one, checkpoint in zip(prepared, saved, strict=True):
        if checkpoint is not None:
            parts.append(checkpoint.tensors)
            continue
        start, made = initial_trained(one, engine.backbone).float().cpu(), made_from(one)
        start = start if made is None else made.start(start, one.run.seed)
        moments = {name: torch.zeros_like(start) for name in MOMENTS}
        parts.append({"prompt": start, AVERAGE: start, **moments, "adam_step": torch.zeros(1)})
    names = ("prompt", *MOMENTS, *([AVERAGE] if prepared[0].run.average else []))
    whole = {name: torch.cat([part[name] for part in parts]) for name in names}
    steps = [part["adam_step"] for one, part in zip(prepared, parts, strict=True) if goes_on(one)]
    steps = steps or [part["adam_step"] for part in parts]
    engine.load_state({**whole, "adam_step": torch.stack(steps).amax(0)})


def _conclude(
    trainer: PopulationTrainer, untrained: Mapping[str, Evaluation], results: Mapping[str, Evaluation], ranks: Ranks,
    folder: Path,
) -> None:  # fmt: skip
    """population.json, and its table on the console."""
    members = [
        {
            "name": member.name, "task": member.prepared.task.name, "settings": asdict(member.trainer.run),
            "metrics": results[member.name].metrics if member.name in results else None,
            "untrained": untrained[member.name].metrics, "majority": untrained[member.name].majority,
            "majority_metrics": majority_metrics(member.prepared.examples.evaluation, member.prepared.task),
            "best_step": member.progress.best_step, "steps": member.progress.step, "failed": member.failed or None,
            "rows": dict(member.prepared.digests), "template": member.prepared.task.spec(),
        }
        for member in trainer.members
    ]  # fmt: skip
    summary = summarise(members)
    guard = OutputGuard(ranks, folder)
    if ranks.is_main:
        with guard.writing():
            write_json(folder / "population.json", {"members": members, "summary": summary, "versions": versions()})
    guard.agree()
    for line in table(summary):
        log.info("%s", line)
    failed = [f"{one['name']} ({one['failed']})" for one in members if one["failed"]]
    log.info("failed: %s", "; ".join(failed) if failed else "none")
    log.info("every member's files: %s", folder / "members")
    if TENSORBOARD in report_names(trainer.members[0].prepared.run.report_to):
        log.info("scalars: tensorboard --logdir %s (means with their band: Custom scalars)", folder)


def summarise(members: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By metric, behind its task's name where there are several tasks: mean, std, min and max over the members that
    have a result, how many members there are and have failed, the means of the untrained prompts and of always giving
    the most frequent answer.
    """
    found: dict[str, dict[str, Any]] = {}
    tasks = dict.fromkeys(one["task"] for one in members)
    for task in tasks:
        own = [one for one in members if one["task"] == task]
        scored = [one["metrics"] for one in own if one["metrics"] is not None]
        for metric in own[0]["untrained"]:
            values = [metrics[metric] for metrics in scored]
            found[metric if len(tasks) == 1 else f"{task} {metric}"] = {
                "mean": mean(values) if values else None, "std": stdev(values) if len(values) > 1 else None,
                "min": min(values, default=None), "max": max(values, default=None), "members": len(own),
                "failed": sum(one["failed"] is not None for one in own),
                "untrained": mean(one["untrained"][metric] for one in own),
                "majority": mean(one["majority_metrics"][metric] for one in own),
            }  # fmt: skip
    return found


_COLUMNS = ("members", "failed", "mean", "std", "min", "max", "untrained", "majority")


def table(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of the table over members: one a metric."""
    lines = [f"{'':28}" + "".join(f"{name:>10}" for name in _COLUMNS)]
    for metric, values in summary.items():
        shown = (
            "-" if (x := values[name]) is None else f"{x:.3f}" if isinstance(x, float) else str(x) for name in _COLUMNS
        )
        lines.append(f"{metric:28}" + "".join(f"{text:>10}" for text in shown))
    return lines
