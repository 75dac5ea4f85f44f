"""How many tokens a step works on: as given, or counted in the rows that training would pack."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptp_ds.config.batch import default_batch, gives_batch
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import in_every_row, plan_head, rows_for
from ptp_ds.models.positions import row_room
from ptp_ds.models.source import load_tokenizer
from ptp_ds.tasks import Task, load_task
from ptp_ds.training.examples import train_examples

# What tokens_of reads of a run. The seed, which says what rows are held out, moves the mean a little and is left out.
_READ = ("task", "data_dir", "dataset", "train_split", "select_split", "holdout", "max_length", "head", "prompt",
         "prompt_length", "delta_target", "streams", "tokens_per_step", "batch_size")  # fmt: skip


@dataclass(frozen=True)
class StepTokens:
    """tokens: of a step over all ranks and streams, without what stands in front of all rows. in_rows: whether each row
    holds the prompt, among them. shared: tokens that all rows begin with, in front of them once. source: where the
    number comes from."""

    tokens: int
    in_rows: bool
    shared: int
    source: str


def tokens_of(runs: Sequence[RunConfig], explicit: Collection[str], world: int, config: Any) -> list[StepTokens]:
    """Each run's; runs that differ in nothing that is read here are counted once. explicit: settings that were given.

    Raises UserError where training would refuse the rows or --max_length.
    """
    counted: dict[tuple[Any, ...], StepTokens] = {}
    keys = [tuple(getattr(run, name) for name in _READ) for run in runs]
    for run, key in zip(runs, keys, strict=True):
        if key not in counted:
            counted[key] = _tokens_of(run, explicit, world, config)
    return [counted[key] for key in keys]


def _tokens_of(run: RunConfig, explicit: Collection[str], world: int, config: Any) -> StepTokens:
    task = load_task(run.task)
    in_rows = in_every_row(plan_head(config, run.head, task).kind, task, run.delta_target)
    if run.tokens_per_step is not None:
        return StepTokens(run.tokens_per_step, in_rows, 0, "--tokens_per_step")
    asked = not {"task", "batch_size"}.isdisjoint(explicit) or run.task != RunConfig.task
    if not asked or not Path(run.model).is_dir():
        why = "no --tokens_per_step"
        if "task" in explicit:
            why += f", and {run.model} has no tokenizer here for {run.task}'s rows"
        return StepTokens(4096 * world, in_rows, 0, f"4096 a rank: {why}")
    mean, shared = row_tokens(run, task, config)
    hands = world * run.gradient_accumulation_steps
    batch = run.batch_size if gives_batch(run, explicit) else default_batch(hands)
    source = f"--batch_size {batch} rows of {mean:.0f} tokens"
    return StepTokens(round(batch * run.streams * mean), in_rows, shared, source)


def row_tokens(run: RunConfig, task: Task, config: Any) -> tuple[float, int]:
    """(mean tokens of a training row, one stream, as it is packed; tokens that all begin with, counted there no more).

    --model must be a folder with a tokenizer.
    """
    plan, tokenizer = plan_head(config, run.head, task), load_tokenizer(Path(run.model))
    rows = rows_for(plan, task, tokenizer, run.prompt, run.prompt_length, run.delta_target)
    room = row_room(run.max_length, run.prompt_length, config, plan) - rows.extra_tokens
    examples = train_examples(run, task, tokenizer, room, plan.kind)
    shared = rows.shared_start(examples)
    return sum(rows.length(example) - shared for example in examples) / len(examples), shared
