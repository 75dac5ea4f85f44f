"""One run from its preparation to its files: what scripts/train.py does for a prompt, alone or in a population.

`prepare` is every check that needs no model; `train_run` is the rest.
"""

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ptp_ds.adapters.hub import base_model_name
from ptp_ds.adapters.origin import warn_if_overtaken
from ptp_ds.adapters.read import adapter_folder, read_adapter
from ptp_ds.adapters.record import card_record, config_record, result_record
from ptp_ds.adapters.share import push_adapter, require_can_push
from ptp_ds.adapters.task import starting_head
from ptp_ds.adapters.write import write_adapter
from ptp_ds.commands.introduction import introduction
from ptp_ds.config.batch import gives_batch
from ptp_ds.config.checks import describe_unread, unsuited
from ptp_ds.config.ds_config import read_ds_config, resolve_here
from ptp_ds.config.run_config import RunConfig
from ptp_ds.config.start_text import with_instruction
from ptp_ds.errors import UserError
from ptp_ds.files import write_json, write_jsonl
from ptp_ds.models.heads import rows_for
from ptp_ds.models.positions import checked_length, row_room
from ptp_ds.models.source import open_source
from ptp_ds.perturb.mask import mask_token_id
from ptp_ds.prompts import prompt_width
from ptp_ds.ranks.distributed import Ranks, env_rank, env_world
from ptp_ds.ranks.faults import OutputGuard
from ptp_ds.ranks.log import get_logger
from ptp_ds.ranks.signals import ignore_stop_signals
from ptp_ds.ranks.watchdog import Watchdog
from ptp_ds.tasks import Task, load_task
from ptp_ds.tasks.predictions import prediction_lines
from ptp_ds.training.checkpoint import set_aside
from ptp_ds.training.continuation import (
    Continuation,
    checked_output_dir,
    continuation_of,
    identity_of,
    set_results_aside,
)
from ptp_ds.training.engine import Engine
from ptp_ds.training.evaluate import Evaluation, score_examples
from ptp_ds.training.examples import load_splits, nothing_to_change, require_rows_for, run_examples
from ptp_ds.training.failed import forget_failure
from ptp_ds.training.monitor import Monitor, peak_memory_bytes
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.progress import Progress
from ptp_ds.training.start import initial_trained, neighbours_of, open_engine, perturbation_unit
from ptp_ds.training.step import settings_of
from ptp_ds.training.trackers import TENSORBOARD, of_member, report_names, require_trackers, told_settings
from ptp_ds.training.trainer import Trainer, require_finite

log = get_logger(__name__)


def prepare(run: RunConfig, explicit: Collection[str] = ()) -> Prepared:
    """Every check that needs no model: DeepSpeed JSON, output folder, task, data, tokenizer, checkpoint.

    explicit: settings that the user named, for messages that tell them from defaults. Raises ValueError for what is
    wrong, before anything expensive; warns of settings that have no effect.
    """
    if run.push_to_hub is not None and env_rank() == 0:  # who pushes in the end
        require_can_push(run.push_to_hub)
    require_trackers(run.report_to)
    raw = read_ds_config(run.ds_config)
    task = load_task(run.task)
    _require_class_words(run, task)
    run = with_instruction(run, task)
    output_dir = checked_output_dir(run)
    continuation = continuation_of(run, output_dir)
    if continuation.batch_size is not None and not gives_batch(run, explicit):
        run, explicit = replace(run, batch_size=continuation.batch_size), {*explicit, "batch_size"}
    splits = load_splits(run, task)
    source = open_source(run.model, run.head, task)
    resolved = resolve_here(raw, run, explicit, source)
    if not gives_batch(run, explicit):
        run = replace(run, batch_size=resolved.config["train_batch_size"])
    adapter, adapter_head = None, {}
    if run.init_adapter:
        given = adapter_folder(run.init_adapter)
        warn_if_overtaken(given)
        adapter = read_adapter(given, prompt_width(run.prompt, source.config), run.prompt_length, run.prompt)
        adapter_head = starting_head(given, source.config, source.head_plan, task)
    rows = rows_for(source.head_plan, task, source.tokenizer, run.prompt, run.prompt_length, run.delta_target)
    mask_id = mask_token_id(source.tokenizer, run.mask_token)
    room = row_room(run.max_length, run.prompt_length, source.config, source.head_plan) - rows.extra_tokens
    examples = run_examples(run, task, splits, source.tokenizer, room, source.head_plan.kind)
    beside = run.prompt_length + rows.extra_tokens
    twin_room = checked_length(source.config, examples.longest + beside, room + beside) - beside
    require_rows_for(run, rows, examples.train, env_world() * run.gradient_accumulation_steps)
    identity = identity_of(run, task, source, splits, adapter, resolved.dtype, adapter_head)
    changes = continuation.require_same(identity)
    still = nothing_to_change(run, examples.train, source.tokenizer)
    _warn(run, explicit, continuation, [*changes, *still])
    return Prepared(
        run=run, task=task, source=source, rows=rows, resolved=resolved, examples=examples, continuation=continuation,
        identity=identity, mask_id=mask_id, room=twin_room, output_dir=output_dir, adapter=adapter,
        adapter_head=adapter_head,
        digests={name: split.digest for name, split in splits.items()},
    )  # fmt: skip


def _require_class_words(run: RunConfig, task: Task) -> None:
    """UserError where --prompt_init labels has no words to start at."""
    if run.prompt_init == "labels" and task.choice:
        raise UserError(
            f"--prompt_init labels starts at a task's class words, and {task.name} has none: its answers differ from "
            "row to row; give --prompt_init vocab or text."
        )


def _warn(run: RunConfig, explicit: Collection[str], continuation: Continuation, changes: Sequence[str]) -> None:
    for sentence in continuation.skipped:
        assert continuation.folder is not None
        log.warning("warning: %s; going on from %s, the one before", sentence, continuation.folder.name)
    for sentence in changes:
        log.warning("warning: %s", sentence)
    for sentence in (*describe_unread(run, set(explicit)), *unsuited(run, set(explicit))):
        log.warning("warning: %s", sentence)


def default_output_dir(prepared: Prepared, ranks: Ranks) -> Path:
    """runs/<task>-<perturbation>-<seed>-<time>, by rank 0's clock."""
    run, now = prepared.run, time.localtime(ranks.from_main(int(time.time())))
    stamp = time.strftime("%Y%m%d-%H%M%S", now)
    return Path("runs") / f"{prepared.task.name}-{run.chosen_perturbation.name}-{run.seed}-{stamp}"


def open_output(prepared: Prepared, ranks: Ranks, output: OutputGuard, stays: bool = False) -> None:
    """The run's folder with its config.json; checkpoints and results that it doesn't go on from are set aside.

    stays: whether the run goes on no more, so that its results are those of its end.
    """
    if ranks.is_main:
        description, continuation = config_record(prepared, ranks), prepared.continuation
        damaged, left = bool(continuation.skipped), []
        with output.writing():
            output.folder.mkdir(parents=True, exist_ok=True)
            write_json(output.folder / "config.json", description)
            left = [] if stays else set_results_aside(output.folder, continuation)
            if continuation.folder is not None:
                left += set_aside(output.folder / "checkpoints", continuation.folder, damaged)
        if left and not damaged:
            log.info("going on from %s: set aside %s", continuation.folder or "the start", ", ".join(left))
    output.agree()


def train_run(prepared: Prepared, ranks: Ranks, watchdog: Watchdog) -> int:
    """Trains, evaluates and exports; returns the exit code (0, or 128 + signal where a signal stopped it)."""
    run, output_dir = prepared.run, prepared.output_dir or default_output_dir(prepared, ranks)
    for line in introduction(prepared, ranks):
        log.info("%s", line)
    output = OutputGuard(ranks, output_dir)
    open_output(prepared, ranks, output)
    engine, progress = open_engine(prepared, ranks)
    log.info("  output: %s", output_dir)
    if prepared.continuation.checkpoint is not None:
        log.info("resumed behind step %d", progress.step)
    unit = perturbation_unit(prepared, engine.backbone)
    trainer = open_trainer(prepared, engine, progress, unit, output, watchdog)
    try:
        watchdog.doing("scoring the untrained prompt")
        untrained = score_untrained(prepared, trainer, progress)
        trainer.train(progress)
        if progress.stopped_by:
            ignore_stop_signals()
            log.info(
                "stopped by signal %d after step %d; saved: --resume auto goes on", progress.stopped_by, progress.step
            )
            return 128 + progress.stopped_by
        watchdog.doing("the last evaluation")
        best = progress.best_prompt
        assert best is not None, "the last step always evaluates"
        result = trainer.evaluate(best, prepared.examples.evaluation)
        report_run(prepared, trainer, progress, result, untrained)
        if ranks.is_main:  # as a member of a population it may have failed before
            with output.writing():
                forget_failure(output.folder)
        if prepared.examples.predict_split is not None:
            asked, budget = prepared.examples.predict, run.eval_tokens
            scores = score_examples(engine.backbone, best, asked, ranks, budget, trainer.beat)
            write_predictions(prepared, trainer, scores)
    finally:
        with output.writing():
            trainer.monitor.close()
    output.agree()
    _announce(prepared, result, untrained, progress, output_dir)
    if run.push_to_hub is not None and ranks.is_main:
        watchdog.doing("pushing the adapter")
        _push(run, run.push_to_hub, output_dir)
    return 0


def open_trainer(
    prepared: Prepared, engine: Engine, progress: Progress, unit: float, output: OutputGuard, watchdog: Watchdog,
    speaks: bool = True,
) -> Trainer:  # fmt: skip
    """A Trainer whose records lie in the output's folder. unit: see perturbation_unit; speaks: see Monitor.

    A member of a population, which doesn't speak, has TensorBoard alone: other trackers are told of all together.
    """
    run, ranks = prepared.run, output.ranks
    reports = run.report_to if speaks else of_member(run.report_to)
    with output.writing():
        monitor = Monitor(output.folder, ranks, progress.step, run.max_steps, speaks, prepared.listeners, reports,
                          told_settings(run))  # fmt: skip
    output.agree()
    settings = settings_of(run, unit, prepared.mask_id, engine.backbone.vocabulary, prepared.room)
    return Trainer(
        run=run, task=prepared.task, engine=engine, ranks=ranks, settings=settings,
        train_examples=prepared.examples.train, select_examples=prepared.examples.select, monitor=monitor,
        output_dir=output.folder, identity=prepared.identity, neighbours=neighbours_of(prepared), watchdog=watchdog,
    )  # fmt: skip


def score_untrained(prepared: Prepared, trainer: Trainer, progress: Progress) -> Evaluation:
    """The prompt as it starts, on --eval_split: what training has to beat. A resumed run scores it again."""
    start = initial_trained(prepared, trainer.engine.backbone)
    result = trainer.evaluate(start, prepared.examples.evaluation)
    record_untrained(trainer, progress, result)
    log.info("  untrained prompt: %s", result.shown)
    return result


def record_untrained(trainer: Trainer, progress: Progress, result: Evaluation) -> None:
    """Puts the untrained prompt's scores on record, once a run."""
    output = OutputGuard(trainer.ranks, trainer.output_dir)
    if progress.step == 0:
        scores = {**result.metrics, "cross_entropy": result.cross_entropy}
        trainer.monitor.evaluation(0, "untrained", scores, output)
    output.agree()


def report_run(
    prepared: Prepared, trainer: Trainer, progress: Progress, result: Evaluation, untrained: Evaluation
) -> None:
    """Writes adapter and result.json. result: the best prompt's scores on --eval_split, untrained: the start's.

    Raises NonFiniteLossError for a result that is no number.
    """
    require_finite(result, "--eval_split", progress.best_step)
    engine, ranks, output = trainer.engine, trainer.ranks, OutputGuard(trainer.ranks, trainer.output_dir)
    metrics = {**result.metrics, "cross_entropy": result.cross_entropy}
    trainer.monitor.evaluation(progress.step, "eval", metrics, output)
    with output.writing():
        trainer.monitor.conclude(progress.step, metrics)
    peak = torch.tensor([peak_memory_bytes(ranks.device)], dtype=torch.float64, device=ranks.device)
    peak_bytes = int(ranks.max(peak))
    if ranks.is_main:
        summary = result_record(prepared, ranks, progress, result, untrained, peak_bytes)
        with output.writing():
            _write_adapter(prepared, engine, progress, summary, output.folder / "adapter")
            write_json(output.folder / "result.json", summary)
    output.agree()


def _write_adapter(prepared: Prepared, engine: Engine, progress: Progress, summary: dict, folder: Path) -> None:
    source, task = prepared.source, prepared.task
    assert progress.best_prompt is not None
    prompt, head = engine.backbone.head.split(progress.best_prompt)
    card = card_record(prepared, summary)
    write_adapter(
        folder, prompt, base_model_name(prepared.run.model), source.config, card, kind=prepared.run.prompt,
        plan=source.head_plan, head=head, in_text=task.places_prompt,
    )  # fmt: skip


def _push(run: RunConfig, repo_id: str, output_dir: Path) -> None:
    """Pushes what the run has saved. UserError where that fails: the sentence says how to go on."""
    private = run.hub_visibility == "private"
    try:
        log.info("pushed: %s", push_adapter(output_dir, repo_id, private))
    except UserError as error:
        again = f"ptp push --adapter {output_dir} {repo_id}{' --private' if private else ''}"
        why = str(error).removesuffix(".")
        raise UserError(f"{why}; the run is saved whole, so push it by `{again}`.") from error.__cause__


def write_predictions(prepared: Prepared, trainer: Trainer, scores_NC: Tensor) -> None:
    """predictions/<Task>.jsonl of --predict_split. scores_NC: the best prompt's."""
    task, split, output = prepared.task, prepared.examples.predict_split, OutputGuard(trainer.ranks, trainer.output_dir)
    assert split is not None
    file = output.folder / "predictions" / f"{task.name}.jsonl"
    if trainer.ranks.is_main:
        with output.writing():
            write_jsonl(file, prediction_lines(task, split, scores_NC.argmax(-1).tolist()))
    output.agree()
    log.info("predictions for %s: %s", prepared.run.predict_split, file)


def _announce(
    prepared: Prepared, result: Evaluation, untrained: Evaluation, progress: Progress, output_dir: Path
) -> None:
    log.info(
        "\n%s %s (%d rows, prompt of step %d): %s  |  untrained prompt: %s  |  majority class: accuracy %.3f",
        prepared.task.name, prepared.run.eval_split, result.examples, progress.best_step, result.shown,
        untrained.shown, result.majority,
    )  # fmt: skip
    log.info("adapter, result.json and logs: %s", output_dir)
    if TENSORBOARD in report_names(prepared.run.report_to):
        log.info("scalars: tensorboard --logdir %s/tensorboard", output_dir)
