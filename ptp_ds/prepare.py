"""Every check that needs no model and no process group: flags, data, tokens, checkpoint, before anything expensive."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptp_ds.backbone import first_position, max_row_length
from ptp_ds.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, newest_whole, require_same_run
from ptp_ds.config import RunConfig, parse_run
from ptp_ds.data import Split, Tokenised, hold_out, load_split, tokenise
from ptp_ds.distributed import env_host_ranks, env_world
from ptp_ds.ds_config import ResolvedDeepSpeed, read_ds_config, resolve_ds_config
from ptp_ds.export import read_adapter
from ptp_ds.heads import HeadPlan, auto_class, plan_head
from ptp_ds.loading import load_config, load_tokenizer
from ptp_ds.models import resolve_model
from ptp_ds.packing import Example
from ptp_ds.perturb.mask import mask_token_id
from ptp_ds.predictions import check_numbers
from ptp_ds.prompts import prompt_width
from ptp_ds.redact import redacted
from ptp_ds.rows import Rows, rows_for
from ptp_ds.shapes import shape_of
from ptp_ds.tasks import Task, load_task


@dataclass(frozen=True)
class Prepared:
    """What is known before any process group or model exists."""

    run: RunConfig
    task: Task
    folder: Path
    config: Any
    plan: HeadPlan
    rows: Rows
    tokenizer: Any
    resolved: ResolvedDeepSpeed
    train: Sequence[Example]
    select: Sequence[Example]
    evaluation: Sequence[Example]
    truncated: int
    identity: dict[str, Any]
    output_dir: Path | None
    checkpoint: Checkpoint | None
    adapter: Tensor | None
    mask_id: int
    predict_split: Split | None = None
    predict: Sequence[Example] = ()
    digests: Mapping[str, str] = field(default_factory=dict)  # of each split's rows
    damaged: bool = False


def prepare(argv: Sequence[str], description: str = "") -> Prepared:
    """Every check that needs no model: flags, DeepSpeed JSON, output folder, task, data, tokenizer, checkpoint."""
    run, explicit = parse_run(argv, description)
    raw = read_ds_config(run.ds_config)
    task = load_task(run.task)
    output_dir = _output_dir(run)
    checkpoint_folder, checkpoint, damaged = _to_resume(run, output_dir)
    splits = _load_splits(run, task)
    folder = resolve_model(run.model)
    config = load_config(folder)
    plan = plan_head(config, run.head, task)
    auto_class(config, plan.kind, folder)
    width = config.get_text_config().hidden_size
    offloads = raw["zero_optimization"].get("offload_param", {}).get("device") == "nvme"
    resolved = resolve_ds_config(
        raw, run, explicit, env_world(), width, host_ranks=env_host_ranks(),
        shape=shape_of(config, plan.kind) if offloads else None,
    )  # fmt: skip
    adapter = None
    if run.init_adapter:
        adapter = read_adapter(run.init_adapter, prompt_width(run.prompt, config), run.prompt_length, run.prompt)
    tokenizer = load_tokenizer(folder)
    mask_id = mask_token_id(tokenizer, run.mask_token)
    rows = rows_for(plan, task, tokenizer, run.prompt, run.prompt_length, run.target)
    room = row_room(run.max_length, run.prompt_length, config, plan) - rows.behind
    tokenised = {name: tokenise(task, split, tokenizer, room) for name, split in splits.items()}
    train, select = _train_and_select(run, tokenised)
    predict_split, predict = _to_predict(run, task, tokenizer, room)
    identity = _identity(run, task, config, splits)
    if checkpoint is not None:
        assert checkpoint_folder is not None
        require_same_run(checkpoint, identity, checkpoint_folder)
    for name in run.without_effect(explicit):
        cause = "--tokens_per_step" if name == "batch_size" else f"--perturbation {run.perturbation}"
        _warn(f"warning: --{name} has no effect with {cause}")
    for sentence in run.unsuited(explicit):
        _warn(f"warning: {sentence}")
    truncated = sum(part.truncated for part in tokenised.values())
    return Prepared(
        run, task, folder, config, plan, rows, tokenizer, resolved, train, select, tokenised["eval"].examples,
        truncated, identity, output_dir, checkpoint, adapter, mask_id, predict_split, predict,
        {name: split.digest for name, split in splits.items()}, damaged,
    )  # fmt: skip


def row_room(max_length: int | None, prompt_length: int, config: Any, plan: HeadPlan | None = None) -> int:
    """Tokens of a row behind the prompt; ValueError where the prompt leaves none or --max_length exceeds the model."""
    limit = max_row_length(config)
    if plan is not None and plan.kind != "causal":
        with torch.device("meta"):
            limit -= first_position(auto_class(config, plan.kind, "").from_config(config))
    if max_length is not None and not prompt_length < max_length <= limit:
        raise ValueError(
            f"--max_length {max_length} must lie between the prompt's {prompt_length} tokens and the backbone's "
            f"context of {limit}."
        )
    room = min(limit, max_length or limit) - prompt_length
    if room < 1:
        raise ValueError(f"--prompt_length {prompt_length} leaves no room in the backbone's context of {limit} tokens.")
    return room


def _warn(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(redacted(text), file=sys.stderr, flush=True)


def _output_dir(run: RunConfig) -> Path | None:
    """--output_dir, checked; None where it isn't given: rank 0 then names one by the time (default_output_dir)."""
    if run.output_dir is None:
        return None
    folder = Path(run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; give a folder.")
    holds_run = any((folder / name).exists() for name in ("config.json", "result.json", "checkpoints"))
    if holds_run and run.resume is None:
        raise ValueError(
            f"--output_dir {folder} holds another run; continue it with --resume auto or give a new folder."
        )
    return folder


def _to_resume(run: RunConfig, output_dir: Path | None) -> tuple[Path | None, Checkpoint | None, bool]:
    """The checkpoint that --resume asks for, its folder, and whether newer ones were passed over, being damaged."""
    if run.resume is None:
        return None, None, False
    if run.resume != "auto":
        folder = find_checkpoint(run.resume)
        return folder, load_checkpoint(folder), False
    assert output_dir is not None
    newest, checkpoint, told = newest_whole(output_dir)
    for sentence in told:
        assert newest is not None
        _warn(f"warning: {sentence}; going on from {newest.name}, the one before")
    return newest, checkpoint, bool(told)


def _load_splits(run: RunConfig, task: Task) -> dict[str, Split]:
    names = {"train": run.train_split, "eval": run.eval_split}
    if run.select_split is not None:
        names["select"] = run.select_split
    return {name: load_split(task, split, run.data_dir, run.dataset) for name, split in names.items()}


def _to_predict(run: RunConfig, task: Task, tokenizer: Any, room: int) -> tuple[Split | None, Sequence[Example]]:
    """--predict_split's rows, read without labels; ValueError where its prediction file couldn't be written."""
    if run.predict_split is None:
        return None, ()
    split = load_split(task, run.predict_split, run.data_dir, run.dataset)
    examples = tokenise(task, split, tokenizer, room, labelled=False).examples
    check_numbers(task, split, len(examples))
    return split, examples


def _train_and_select(run: RunConfig, tokenised: dict[str, Tokenised]) -> tuple[Sequence[Example], Sequence[Example]]:
    train = tokenised["train"].examples
    if "select" in tokenised:
        select = tokenised["select"].examples
    else:
        kept, held = hold_out(len(train), run.holdout, run.seed, [example.group for example in train])
        train, select = [train[number] for number in kept], [train[number] for number in held]
    train = [example for example in train if example.trainable]
    if not train:
        raise ValueError(f"No row of split {run.train_split!r} has its right answer among its options; none to learn.")
    return train, select


def _identity(run: RunConfig, task: Task, config: Any, splits: dict[str, Split]) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it."""
    names = (
        "model", "head", "prompt", "prompt_length", "prompt_mlp", "perturbation", "divergence", "reg_weight",
        "reg_warmup_steps", "sigma", "epsilon", "alpha", "ascent_steps", "norm", "units", "target", "mask_share",
        "mask_token", "batch_size", "tokens_per_step", "lr", "weight_decay", "warmup_steps", "lr_schedule",
        "max_grad_norm", "max_steps", "seed", "holdout", "max_length",
    )  # fmt: skip
    attacks = run.how is not None and run.how.attack is not None
    asked = ("a2t_share", "a2t_neighbours", "a2t_min_cosine") if attacks else ()
    identity = {"task": task.spec(), **{name: getattr(run, name) for name in (*names, *asked)}}
    identity |= {"perturbation": run.chosen.name, "perturbation file's sha256": run.chosen.sha256}
    identity["backbone"] = f"{config.model_type}, width {config.get_text_config().hidden_size}"
    identity["training data"] = splits["train"].digest
    return redacted(json.loads(json.dumps(identity)))
