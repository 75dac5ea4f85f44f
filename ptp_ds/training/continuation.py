"""Whether a run starts or goes on: its output folder, the checkpoint to resume from, what both must share, what is left
of an end before.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import is_file, is_folder, is_locked, read_json
from ptp_ds.models.identity import model_identity
from ptp_ds.models.source import BackboneSource
from ptp_ds.precision import PRECISION_OF
from ptp_ds.redact import redacted
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split
from ptp_ds.training.checkpoint import (
    WEIGHTS,
    Checkpoint,
    find_checkpoint,
    left_behind,
    list_checkpoints,
    load_checkpoint,
    newest_whole,
    require_same_run,
)
from ptp_ds.training.trackers import TRACKED

_OF_ONE = ("result.json", "adapter", "checkpoints/*")  # what a run left that another could destroy
_RESULTS = ("adapter", "result.json", "predictions")  # what a run writes at its end alone
_RECORDS = ("log.jsonl", *TRACKED)  # what it writes step by step
_OF_SEVERAL = ("population.json", *(f"members/*/{name}" for name in _OF_ONE))
_FALLING = {"the learning rate": "lr_schedule", "lambda": "reg_schedule"}
_CONFIG = "model's config.json"
_MAY_DIFFER = ("max_steps", "schedule_steps", "precision", _CONFIG)  # between a checkpoint and what goes on from it


@dataclass(frozen=True)
class Continuation:
    """checkpoint: what the run goes on from, None where it starts; folder: where that lies. skipped: a sentence for
    each newer one that --resume auto passed over because it is damaged.
    """

    checkpoint: Checkpoint | None = None
    folder: Path | None = None
    skipped: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int | None:
        """The checkpoint's, for a run that gives none: what the default becomes depends on the ranks."""
        found = self.checkpoint.identity.get("batch_size") if self.checkpoint is not None else None
        return found if isinstance(found, int) and found > 0 else None

    def require_same(self, identity: Mapping[str, Any]) -> list[str]:
        """ValueError that names what differs between the checkpoint and the run that would go on from it.

        How long the run trains may differ, where its learning rate ends, the precision, and the model's config.json
        beside the same weights: a sentence for each that does.
        """
        if self.checkpoint is None:
            return []
        assert self.folder is not None
        saved = self.checkpoint.identity
        require_same_run(self.checkpoint, {n: v for n, v in identity.items() if n not in _MAY_DIFFER}, self.folder)
        if identity["max_steps"] < self.checkpoint.step:
            step, run = self.checkpoint.step, self.folder.parent.parent
            there = f", or score the adapter in {run} by `ptp evaluate`" if is_folder(run / "adapter") else ""
            raise UserError(
                f"--max_steps is {identity['max_steps']} and {self.folder} has {step} steps behind it; give "
                f"--max_steps {step} to end it there, or more{there}."
            )
        changes = []
        now = identity["precision"]
        if (before := saved.get("precision", now)) != now:
            changes.append(
                f"the backbone's precision was {before} and is {now} now: the steps from {self.checkpoint.step + 1} on "
                f"are not those of the run before (--precision {before} keeps it)"
            )
        if saved.get(_CONFIG, identity[_CONFIG]) != identity[_CONFIG]:
            changes.append(
                f"the config.json of {identity['model']} is not the one that the run began with, though its weights "
                f"are: the steps from {self.checkpoint.step + 1} on may be others than the run's before"
            )
        if saved.get("max_steps") != identity["max_steps"]:
            changes.append(f"--max_steps was {saved.get('max_steps')} and is {identity['max_steps']} now")
        end, now = saved.get("schedule_steps", saved.get("max_steps")), identity["schedule_steps"]
        falling = [what for what, name in _FALLING.items() if identity[name] != "constant"]
        if end != now and falling:
            # One that ended earlier would leave the new steps at a rate of 0.
            keeps = isinstance(end, int) and end >= identity["max_steps"]
            advice = f" (--schedule_steps {end} keeps the old)" if keeps else ""
            changes.append(
                f"the schedule of {' and '.join(falling)} ended at step {end} and ends at step {now} now: from step "
                f"{self.checkpoint.step + 1} on {'it is another' if len(falling) == 1 else 'they are others'}{advice}"
            )
        return changes


def checked_output_dir(run: RunConfig, several: bool = False) -> Path | None:
    """--output_dir, checked; None where it isn't given: rank 0 then names one by the time.

    several: whether it is a population's folder, which a run of one prompt can't go on in, nor the other way round.
    """
    if run.output_dir is None:
        return None
    folder = Path(run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; give a folder.")
    if any(is_locked(file) for file in (folder / "log.jsonl", *folder.glob("members/*/log.jsonl"))):
        raise UserError(f"--output_dir {folder} is being written by a run that still goes on; give another folder.")
    if several and _holds(folder, _OF_ONE):
        raise UserError(f"--output_dir {folder} holds a run of one prompt; give several prompts a new folder.")
    if not several and _holds(folder, _OF_SEVERAL):
        raise UserError(
            f"--output_dir {folder} holds a run of several prompts; continue it with its --seeds or --population and "
            f"--resume auto, one of them with --output_dir {folder / 'members'}/NAME, or give a new folder."
        )
    if holds_run(folder) and run.resume is None:
        raise UserError(
            f"--output_dir {folder} holds another run; continue it with --resume auto or give a new folder."
        )
    return folder


def holds_run(folder: Path) -> bool:
    """Whether the folder holds what another run, of one prompt or several, would destroy.

    What failed before its first checkpoint left settings and a log: nothing of that kind.
    """
    return _holds(folder, (*_OF_ONE, *_OF_SEVERAL))


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def continuation_of(run: RunConfig, output_dir: Path | None) -> Continuation:
    """What --resume asks for; nothing without it. Raises ValueError for a checkpoint that isn't there or is damaged."""
    if run.resume is None:
        return Continuation()
    if run.resume != "auto":
        folder = find_checkpoint(run.resume)
        return Continuation(load_checkpoint(folder), folder)
    assert output_dir is not None
    newest, checkpoint, skipped = newest_whole(output_dir)
    return Continuation(checkpoint, newest, tuple(skipped))


def set_results_aside(output_dir: Path, continuation: Continuation) -> list[str]:
    """Renames what a run has left in the folder that isn't the one which goes on; returns the new names. Rank 0 only,
    before the checkpoints are set aside.

    Results, where the run starts anew, goes on from another folder's checkpoint, or from one before the end that they
    are of. Where that is because newer checkpoints are damaged, it is the same run. Records, where the checkpoint isn't
    the folder's: up to one that is, they are the run's own.
    """
    if continuation.skipped:
        return []
    held = [name for name in _RESULTS if (output_dir / name).exists()]
    ended = bool({"adapter", "result.json"} & set(held))
    folder = continuation.folder
    own = folder is not None and any(one.samefile(folder) for one in list_checkpoints(output_dir / "checkpoints"))
    names = held if ended and not (own and _keeps_end(output_dir, continuation)) else []
    if not own and (ended or folder is not None):
        names = [*names, *(name for name in _RECORDS if (output_dir / name).exists())]
    free = (f"left{number or ''}" for number in itertools.count())
    known = (*_RESULTS, *_RECORDS)
    ending = next(one for one in free if not any((output_dir / f"{name}.{one}").exists() for name in known))
    for name in names:
        (output_dir / name).rename(output_dir / f"{name}.{ending}")
    return [f"{name}.{ending}" for name in names]


def _keeps_end(output_dir: Path, continuation: Continuation) -> bool:
    """Whether the end that the folder's results are of is not behind its checkpoint that the run goes on from."""
    assert continuation.checkpoint is not None
    assert continuation.folder is not None
    steps = _ended_at(output_dir)
    if steps is None:
        return not left_behind(output_dir / "checkpoints", continuation.folder)
    return steps <= continuation.checkpoint.step


def _ended_at(output_dir: Path) -> int | None:
    """The step at which the run in the folder has ended, None where no result.json says."""
    file = output_dir / "result.json"
    try:
        found = read_json(file, str(file)) if is_file(file) else None
    except UserError:
        return None
    steps = found.get("steps") if isinstance(found, dict) else None
    return steps if isinstance(steps, int) else None


def identity_of(
    run: RunConfig,
    task: Task,
    source: BackboneSource,
    splits: Mapping[str, Split],
    adapter: Tensor | None,
    dtype: torch.dtype,
    adapter_head: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """What a checkpoint must share with the run that resumes it. adapter, adapter_head: what --init_adapter holds.

    dtype: the backbone's; it may differ, see Continuation. Raises ValueError for weights that can't be read.
    """
    names = (
        "model", "head", "prompt", "prompt_length", "prompt_mlp", "prompt_residual", "perturbation", "divergence",
        "divergence_gradient", "reg_weight", "reg_warmup_steps", "reg_schedule", "min_confidence", "confidence_in",
        "sigma", "epsilon", "alpha", "ascent_steps", "norm", "units", "target", "mask_share", "mask_token",
        "batch_size", "tokens_per_step", "lr", "weight_decay", "warmup_steps", "lr_schedule", "max_grad_norm",
        "average", "max_steps", "seed", "holdout", "max_length", "prompt_init", "init_text",
    )  # fmt: skip
    attacks = run.active_perturbation is not None and run.active_perturbation.attack is not None
    asked = ("a2t_share", "a2t_neighbours", "a2t_min_cosine") if attacks else ()
    model, text = model_identity(source.folder, source.config), source.config.get_text_config()
    identity: dict[str, Any] = {
        "task": task.spec(), "backbone": f"{source.config.model_type}, width {text.hidden_size}",
        WEIGHTS: model["weights_sha256"], _CONFIG: model["config_sha256"],
    }  # fmt: skip
    identity |= {name: getattr(run, name) for name in (*names, *asked)}
    identity |= {
        "perturbation": run.chosen_perturbation.name,
        "perturbation file's sha256": run.chosen_perturbation.sha256,
    }
    identity["schedule_steps"] = run.schedule_end
    if run.own_settings:
        identity["perturbation_args"] = run.own_settings
    identity["training data"] = splits["train"].digest
    identity["selection data"] = splits["select"].digest if "select" in splits else None
    held = [] if adapter is None else [adapter, *(tensor for _, tensor in sorted((adapter_head or {}).items()))]
    values = b"".join(tensor.float().contiguous().numpy().tobytes() for tensor in held)
    identity["prompt in --init_adapter"] = hashlib.sha256(values).hexdigest() if held else None
    identity["precision"] = PRECISION_OF[dtype]
    return redacted(json.loads(json.dumps(identity)))
