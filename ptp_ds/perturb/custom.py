"""A perturbation by its name: a built-in one, or a Python file of the user's own that defines PERTURBATION.

The file is run once a process, while flags are checked, from the very bytes whose sha256 names it in checkpoints. Its
`sizes` and `reads` name flags that reach a perturbation (PerturbSettings); with no sizes at all it always perturbs.
"""

import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ptp_ds.errors import UserError
from ptp_ds.files import brief
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb import PERTURBATIONS, Noise, Perturbation, PerturbSettings, SharedPass
from ptp_ds.perturb.ball import movable_only
from ptp_ds.perturb.perturbation import Find

BUILT_IN = ("none", *PERTURBATIONS)
_VARIABLE = "PERTURBATION"


@dataclass(frozen=True)
class ChosenPerturbation:
    """name: the built-in one's, or the file's stem. perturbation: None for `none`. sha256: the file's, if it is one."""

    name: str
    perturbation: Perturbation | None
    sha256: str | None = None


def choose_perturbation(name: str) -> ChosenPerturbation:
    """The perturbation that --perturbation names. Raises ValueError for an unknown name or a file with a fault."""
    if name in BUILT_IN:
        return ChosenPerturbation(name, PERTURBATIONS.get(name))
    path = Path(name)
    if path.suffix != ".py":
        near = difflib.get_close_matches(name, BUILT_IN, 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"Unknown perturbation {brief(name)}{hint}: give one of {', '.join(BUILT_IN)} or a .py file.")
    if path.stem in BUILT_IN:
        raise UserError(f"--perturbation {name} has the name of a built-in one; rename the file to tell them apart.")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"--perturbation {name}: {error.strerror}; give the path of a .py file.") from None
    perturbation = getattr(_execute(path, source), _VARIABLE, None)
    _check(perturbation, f"--perturbation {name}")
    assert isinstance(perturbation, Perturbation)
    guarded = (
        perturbation
        if perturbation.find is None or perturbation.carries
        else replace(perturbation, find=_guarded(perturbation.find, name))
    )
    return ChosenPerturbation(path.stem, guarded, hashlib.sha256(source).hexdigest())


def _execute(path: Path, source: bytes) -> ModuleType:
    """The file as a module; ValueError with the line where it raises."""
    name = f"ptp_ds_perturbation_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # no cached bytecode: neither stale nor left behind
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        where = f" at line {line}" if line else ""
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"--perturbation {path} can't be loaded{where}: {type(error).__name__}: {said}.") from error
    return module


def _check(perturbation: Any, where: str) -> None:
    """ValueError for what is no Perturbation, has no function, or names flags that don't reach it."""
    if perturbation is None:
        raise UserError(f"{where} defines no {_VARIABLE}; add {_VARIABLE} = Perturbation(find=..., sizes=(...)).")
    if not isinstance(perturbation, Perturbation):
        raise UserError(
            f"{where}: {_VARIABLE} is of type {type(perturbation).__name__}; expected ptp_ds.perturb.Perturbation."
        )
    given = [function for function in (perturbation.find, perturbation.twins) if function is not None]
    if not given or not all(callable(function) for function in given):
        raise UserError(f"{where}: {_VARIABLE} needs a function as find, as twins, or as both.")
    if perturbation.carries and (perturbation.find is None or perturbation.twins is not None):
        raise UserError(f"{where}: {_VARIABLE} carries its deltas, so it needs find and no twins.")
    sizes = sorted({size for known in PERTURBATIONS.values() for size in known.sizes})
    _check_names(perturbation.sizes, "sizes", sizes, where)
    _check_names(
        perturbation.reads,
        "reads",
        sorted({*sizes, *(flag for p in PERTURBATIONS.values() for flag in p.reads)}),
        where,
    )


def _check_names(names: Any, field: str, known: Sequence[str], where: str) -> None:
    if not isinstance(names, (tuple, list)):
        raise UserError(f"{where}: {field} is {names!r}; expected a tuple of flags' names, such as ({known[-1]!r},).")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.6)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{where}: {name!r} in {field} is no flag that fits{hint}; choose from {', '.join(known)}.")


def _guarded(find: Find, file: str) -> Find:
    """find, whose delta is [T, H] or a ValueError and whose rows are zero where nothing may move."""

    def checked(
        shared: SharedPass | None, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise
    ) -> Tensor:
        delta = find(shared, row, clean_TH, settings, noise)
        shape = tuple(delta.shape) if isinstance(delta, torch.Tensor) else type(delta).__name__
        if shape != tuple(clean_TH.shape):
            raise UserError(
                f"--perturbation {file}: find returned {shape}; expected a tensor of clean_TH's shape "
                f"{tuple(clean_TH.shape)}."
            )
        return movable_only(delta, row)

    return checked
