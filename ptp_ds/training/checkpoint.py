"""Checkpoints: safetensors and JSON of the trained part only, written beside and renamed, for any number of ranks."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ptp_ds.config.run_config import BEFORE
from ptp_ds.errors import UserError
from ptp_ds.files import (
    brief,
    is_file,
    is_folder,
    listed,
    memory_bytes,
    open_tensors,
    read_json,
    sha256_of,
    tensor_shape,
    write_folder,
)
from ptp_ds.training.carried import Part, check_part, part_name, write_part

_STATE, _META = "state.safetensors", "state.json"
_PLAIN, _IN_PARTS = 1, 2  # formats: 2 has carried deltas in files of their own
_NAME = re.compile(r"step-(\d+)")
_HINT = "; resume from another checkpoint"
_LIKE_PROMPT = ("exp_avg", "exp_avg_sq", "average")  # of the prompt's shape
_TENSORS = ("prompt", "exp_avg", "exp_avg_sq", "adam_step", "best_prompt", "carried_delta", "loss_scaler", "average")
_VECTORS = {"adam_step": (1,), "loss_scaler": (4,)}  # and their shapes
_REQUIRED = _TENSORS[:4]
WEIGHTS = "model's weights"  # in an identity, the sha256 of a sample
_LATER = {"selection data", "prompt_init", "init_text", "prompt in --init_adapter", WEIGHTS}  # untold: any fits
_ORDER = "order of answers"
_NUMBERS = ("score", "cross_entropy", "majority", "examples")  # of an Evaluation, beside its metrics


class OtherFormatError(UserError):
    """A checkpoint of another version of this project: whole, but not for this one to read."""


@dataclass(frozen=True)
class Checkpoint:
    """step: optimizer steps done. tensors: Engine.state() and, once chosen, best_prompt. best: its scores or None.

    identity: what must not change between save and resume (model, task, prompt, data, seed ...). carried: of one that
    was read, the files of carried deltas (ptp_ds.training.carried), a rank's each, and their sha256. micro_tokens:
    those of a micro-batch, where they go one after the other: sums are the same to the bit only in the same parts.
    ended: whether a callback had ended the run; older ones don't say. scored: whether the step's prompt was scored on
    the selection rows; None where an older one doesn't say.
    """

    step: int
    tensors: dict[str, Tensor]
    best: dict[str, Any] | None
    identity: dict[str, Any]
    carried: dict[Path, str] = field(default_factory=dict)
    micro_tokens: int | None = None
    ended: bool = False
    scored: bool | None = None


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int | None, carried: Iterable[Part] = ()) -> Path:
    """Writes root/step-NNNNNN and returns it; of the checkpoints up to it, the newest `keep` stay. Rank 0 only.
    None: all stay, until `prune`.

    carried: each rank's carried deltas, taken one after the other.
    """

    def fill(folder: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, folder / _STATE)
        digests = []
        for rank, part in enumerate(carried):
            write_part(folder / part_name(rank), part)
            digests.append(sha256_of(folder / part_name(rank)))
        meta: dict[str, Any] = {
            "format": _IN_PARTS if digests else _PLAIN, "step": checkpoint.step, "best": checkpoint.best,
            "identity": checkpoint.identity, "micro_tokens": checkpoint.micro_tokens,
            "sha256": sha256_of(folder / _STATE), "ended": checkpoint.ended,
            "scored": checkpoint.scored,
        }  # fmt: skip
        if digests:
            meta["carried"] = digests
        (folder / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    target = step_folder(root, checkpoint.step)
    write_folder(target, fill)
    if keep is not None:
        prune(root, checkpoint.step, keep)
    return target


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step-{step:06d}"


def prune(root: Path, step: int, keep: int) -> None:
    """Of the checkpoints up to that of `step`, the newest `keep` stay. Rank 0 only."""
    found = list_checkpoints(root)
    for old in found[: found.index(step_folder(root, step)) + 1][:-keep]:
        shutil.rmtree(old)


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under root, oldest first; unfinished ones have another name."""
    named = [(_NAME.fullmatch(path.name), path) for path in root.glob("step-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def saved_steps(root: Path) -> list[int]:
    """Steps that have a checkpoint under root, in order; some may be damaged."""
    return [int(match[1]) for path in list_checkpoints(root) if (match := _NAME.fullmatch(path.name))]


def gone_on(output_dir: Path, steps: Any) -> str:
    """What is to say of a result of step `steps` where the run in the folder has gone on since, '' where it hasn't.

    A run that is resumed writes its result at its new end alone.
    """
    newest = max(saved_steps(output_dir / "checkpoints"), default=0)
    if not isinstance(steps, int) or newest <= steps:
        return ""
    return f"is of step {steps}, and its run has gone on to step {newest}: let it end, or end it with --resume auto"


def newest_whole(output_dir: Path) -> tuple[Path | None, Checkpoint | None, list[str]]:
    """--resume auto: output_dir's newest checkpoint that is whole (None where there are none), and a sentence for each
    newer one that is damaged. ValueError where all are: their steps are not done again without being asked for.
    """
    told: list[str] = []
    found = list_checkpoints(output_dir / "checkpoints")
    for folder in reversed(found):
        try:
            return folder, load_checkpoint(folder), told
        except OtherFormatError:
            raise
        except UserError as error:
            told.append(str(error).split(";")[0])
    if found:
        raise UserError(
            f"No checkpoint in {output_dir / 'checkpoints'} is whole: {'; '.join(told)}. Put a copy back, or start a "
            "new run in another --output_dir."
        )
    return None, None, told


def left_behind(root: Path, resumed: Path) -> list[Path]:
    """The checkpoints under root that a run doesn't go on from where it resumes `resumed`; see set_aside."""
    found = list_checkpoints(root)
    own = [number for number, folder in enumerate(found) if folder.samefile(resumed)]
    return found[own[0] + 1 :] if own else found


def set_aside(root: Path, resumed: Path, damaged: bool) -> list[str]:
    """Renames what a run that goes on from checkpoint `resumed` leaves behind, and returns the new names. Rank 0 only.

    These are the checkpoints behind it, or all where it isn't one of root's: they are of a run that was left, and
    --resume auto would take the newest of them for this one's. damaged: it has passed over them as damaged.
    """
    names = []
    for folder in left_behind(root, resumed):
        aside = folder.with_name(f"{folder.name}.damaged")
        if damaged:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            free = (f"{folder.name}.left{number or ''}" for number in itertools.count())
            aside = next(path for path in map(folder.with_name, free) if not path.exists())
        folder.rename(aside)
        names.append(aside.name)
    return names


def find_checkpoint(resume: str) -> Path:
    """The checkpoint that --resume names by its folder."""
    path = Path(resume)
    if not is_folder(path):
        raise UserError(f"--resume {resume}: there is no such folder; give a checkpoints/step-... folder or auto.")
    if not is_file(path / _META):
        raise UserError(f"--resume {resume}: not a checkpoint (no {_META}); give a checkpoints/step-... folder.")
    return path


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads and verifies a checkpoint; ValueError where a file is missing, altered, of another format, or holds what
    Engine.state never gave."""
    where = str(folder / _META)
    meta = read_json(folder / _META, f"{where} can't be read", _HINT)
    if not isinstance(meta, dict):
        raise UserError(f"{where} can't be read: no JSON object{_HINT}.")
    if (found := meta.get("format", _PLAIN)) not in (_PLAIN, _IN_PARTS) or isinstance(found, bool):
        later = is_count(found) and _IN_PARTS < found < 1000  # may have other fields; else a damaged number
        error = OtherFormatError if later else UserError
        raise error(f"{folder} has checkpoint format {brief(found)}; this version reads {_PLAIN} and {_IN_PARTS}.")
    step, best, identity = (meta.get(name) for name in ("step", "best", "identity"))
    micro_tokens, ended, scored = meta.get("micro_tokens"), meta.get("ended", False), meta.get("scored")
    fine = is_count(step) and (micro_tokens is None or is_count(micro_tokens)) and isinstance(ended, bool)
    fine = fine and (scored is None or isinstance(scored, bool))
    if not fine or not isinstance(identity, dict) or not (best is None or is_best(best)):
        raise UserError(f"{where} can't be read: it has no valid step, identity and best{_HINT}.")
    assert isinstance(step, int)
    _verify(folder / _STATE, meta.get("sha256"))
    tensors = _load_tensors(folder / _STATE, best is not None)
    carried = _carried(folder, meta, found == _IN_PARTS)
    return Checkpoint(step, tensors, best, identity, carried, micro_tokens, ended, scored)


def _carried(folder: Path, meta: dict[str, Any], in_parts: bool) -> dict[Path, str]:
    """The files of carried deltas and their sha256, each verified."""
    digests = meta.get("carried", [])
    if not isinstance(digests, list) or bool(digests) != in_parts:
        raise UserError(f"{folder / _META} can't be read: its carried deltas are no list of files{_HINT}.")
    files = {folder / part_name(rank): digest for rank, digest in enumerate(digests)}
    for file, digest in files.items():
        _verify(file, digest)
        check_part(file, _HINT)
    return files


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def is_best(best: Any) -> bool:
    """Whether `best` is what Checkpoint says: step, an Evaluation's fields; older ones lack highest and stale."""
    if not isinstance(best, dict) or best.keys() - {"highest", "stale"} != {"step", "evaluation"}:
        return False
    highest = best.get("highest", 0.0)
    if (
        not is_count(best["step"])
        or not is_count(best.get("stale", 0))
        or not isinstance(highest, float)
        or not math.isfinite(highest)
    ):
        return False
    scores = best["evaluation"]
    if (
        not isinstance(scores, dict)
        or scores.keys() != {"metrics", *_NUMBERS}
        or not isinstance(scores["metrics"], dict)
    ):
        return False
    numbers = (*scores["metrics"].values(), *map(scores.get, _NUMBERS))
    return all(isinstance(x, float) or is_count(x) for x in numbers) and scores["examples"] >= 1


def _verify(file: Path, digest: Any) -> None:
    """ValueError for a file whose sha256 differs, or that couldn't be held in memory."""
    try:
        if is_file(file) and file.stat().st_size > memory_bytes():
            raise UserError(f"{file} is larger than this machine's memory{_HINT}.")
        if not is_file(file) or sha256_of(file) != digest:
            raise UserError(f"{file} is missing or altered (its sha256 differs){_HINT}.")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}{_HINT}.") from None


def _load_tensors(file: Path, has_best: bool) -> dict[str, Tensor]:
    """The file's tensors; names and shapes are checked before any is loaded, values behind."""
    with open_tensors(file, str(file), _HINT) as handle:
        names = sorted(handle.keys())
        needed = {*_REQUIRED, *(["best_prompt"] if has_best else [])}
        if unknown := sorted(set(names) - set(_TENSORS)):
            raise UserError(f"{file} holds {listed(unknown)}; expected {', '.join(_TENSORS)}{_HINT}.")
        if missing := sorted(needed - set(names)):
            raise UserError(f"{file} lacks {', '.join(missing)}{_HINT}.")
        shapes = {name: tensor_shape(handle, name, str(file), most=None) for name in names}  # _verify knows the size
        for name, shape in shapes.items():
            alike = shape == shapes["prompt"] if name in _LIKE_PROMPT else len(shape) == 2 and all(shape)
            if not (shape == _VECTORS[name] if name in _VECTORS else alike):
                raise UserError(f"{file}: {name} has shape {shape} beside a prompt of {shapes['prompt']}{_HINT}.")
        tensors = {name: handle.get_tensor(name) for name in names}
    for name, tensor in tensors.items():
        lowest = 0.0 if name in ("adam_step", "exp_avg_sq") else -torch.inf
        if not bool((torch.isfinite(tensor) & (tensor >= lowest)).all()):
            raise UserError(f"{file}: {name} holds values that are not finite or below {lowest}{_HINT}.")
    return tensors


def _with_order(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity and its task's answers in order: a classifier's outputs follow it, and dicts are equal in any."""
    task = identity.get("task")
    answers = task.get("answers") if isinstance(task, dict) else None
    return {**identity, _ORDER: list(answers) if isinstance(answers, dict) else None}


def require_same_run(checkpoint: Checkpoint, identity: dict[str, Any], folder: Path) -> None:
    """ValueError that names what differs between a checkpoint and this run.

    A model is told by its weights, wherever they lie; by its name where the checkpoint is of before they were held.
    """
    before, now = _with_order(checkpoint.identity), _with_order(identity)
    passed = {name for name in _LATER if name not in before}
    passed |= {"model"} if WEIGHTS in before and WEIGHTS in now else set()
    for name, value in now.items():
        saved = before.get(name, BEFORE.get(name))
        if name in passed or saved == value:
            continue
        told = f"its {name} is {brief(saved)}, this run's is {brief(value)}"
        if name == WEIGHTS:
            told = f"the weights of its model, {brief(before.get('model'))}, are not those of {brief(now.get('model'))}"
        elif isinstance(saved, dict) and isinstance(value, dict):  # a task: name what differs, not whole templates
            told = next(
                f"its {name} {brief(key, 60)[1:-1]} is {brief(saved.get(key))}, this run's is {brief(value.get(key))}"
                for key in {**value, **saved}
                if key not in saved or key not in value or saved[key] != value[key]
            )
        raise UserError(
            f"{folder} is a checkpoint of another run: {told}. Resume with the same settings, or start a new run in "
            "another --output_dir."
        )


def prompt_shape(checkpoint: Checkpoint) -> torch.Size:
    """[P, H] of the saved prompt."""
    return checkpoint.tensors["prompt"].shape
