"""Checkpoints: safetensors and JSON of the trained part only, written beside and renamed, for any number of ranks."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptp_ds.models import sha256_of

_STATE, _META = "state.safetensors", "state.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """step: optimizer steps done. tensors: Engine.state() and, once chosen, best_prompt. best: its scores or None.

    identity: what must not change between save and resume (model, task, prompt, data, seed ...).
    """

    step: int
    tensors: dict[str, Tensor]
    best: dict[str, Any] | None
    identity: dict[str, Any]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(target: Path, fill: Any) -> None:
    """fill(folder) writes files into a hidden neighbour, which is synced and then takes target's name."""
    work = target.with_name(f".{target.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        fill(work)
        for file in work.iterdir():
            _sync(file)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        try:
            os.rename(work, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON written beside `path` and renamed."""
    work = path.with_name(f".{path.name}.writing")
    work.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _sync(work)
    os.replace(work, path)


def save_checkpoint(root: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Writes root/step-NNNNNN and returns it; of the checkpoints up to it, the newest `keep` stay. Rank 0 only."""

    def fill(folder: Path) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, folder / _STATE)
        meta = {
            "format": _FORMAT, "step": checkpoint.step, "best": checkpoint.best, "identity": checkpoint.identity,
            "sha256": sha256_of(folder / _STATE),
        }  # fmt: skip
        (folder / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    target = root / f"step-{checkpoint.step:06d}"
    write_folder(target, fill)
    found = list_checkpoints(root)
    for old in found[: found.index(target) + 1][:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders under root, oldest first; unfinished ones have another name."""
    named = [(_NAME.fullmatch(path.name), path) for path in root.glob("step-*") if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def find_checkpoint(resume: str | None, output_dir: Path) -> Path | None:
    """The folder that --resume names: a checkpoint, or the newest one of output_dir for auto (None if it has none)."""
    if resume is None:
        return None
    if resume == "auto":
        found = list_checkpoints(output_dir / "checkpoints")
        return found[-1] if found else None
    path = Path(resume)
    if not path.is_dir():
        raise ValueError(f"--resume {resume}: there is no such folder; give a checkpoints/step-... folder or auto.")
    if not (path / _META).is_file():
        raise ValueError(f"--resume {resume}: not a checkpoint (no {_META}); give a checkpoints/step-... folder.")
    return path


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads and verifies a checkpoint; ValueError where a file is missing, altered or of another format."""
    try:
        meta = dict(json.loads((folder / _META).read_text(encoding="utf-8")))
        if meta.get("format", _FORMAT) == _FORMAT:  # another format may have other fields
            step, digest = int(meta["step"]), meta["sha256"]
            identity, best = dict(meta["identity"]), meta["best"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/{_META} can't be read ({type(error).__name__}); resume from another one.") from None
    if meta.get("format") != _FORMAT:
        raise ValueError(f"{folder} has checkpoint format {meta.get('format')}; this version reads {_FORMAT}.")
    file = folder / _STATE
    if not file.is_file() or sha256_of(file) != digest:
        raise ValueError(f"{file} is missing or altered (its sha256 differs); resume from another checkpoint.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file ({error}); resume from another checkpoint.") from None
    return Checkpoint(step, tensors, best, identity)


def require_same_run(checkpoint: Checkpoint, identity: dict[str, Any], folder: Path) -> None:
    """ValueError that names what differs between a checkpoint and this run."""
    for name, value in identity.items():
        saved = checkpoint.identity.get(name)
        if saved != value:
            if isinstance(saved, dict) and isinstance(value, dict):  # a task: name what differs, not whole templates
                name, saved, value = next(
                    (f"{name} {key}", saved.get(key), value.get(key)) for key in value if saved.get(key) != value[key]
                )
            raise ValueError(
                f"{folder} is a checkpoint of another run: its {name} is {saved!r}, this run's is {value!r}. "
                "Resume with the same settings, or start a new run in another --output_dir."
            )


def prompt_shape(checkpoint: Checkpoint) -> torch.Size:
    """[P, H] of the saved prompt."""
    return checkpoint.tensors["prompt"].shape
