"""A perturbation by its name: a built-in one, or a Python file of the user's own that defines PERTURBATION.

The file is run once a process, while flags are checked, from the very bytes whose sha256 names it in checkpoints. Its
`sizes` and `reads` name flags that reach a perturbation (PerturbSettings); with no sizes at all it always perturbs. Its
`parameters` are its own (ptp_ds.perturb.parameters).
"""

import difflib
import hashlib
import importlib.util
import operator
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ptp_ds.choices import PERTURBATIONS as BUILT_IN
from ptp_ds.errors import UserError
from ptp_ds.files import brief
from ptp_ds.packing.row import PackedRow
from ptp_ds.perturb import PERTURBATIONS, Noise, Perturbation, PerturbSettings, SharedPass
from ptp_ds.perturb.ball import movable_only
from ptp_ds.perturb.parameters import check_parameters
from ptp_ds.perturb.perturbation import Find, Twin, Twins
from ptp_ds.ranks.faults import befell
from ptp_ds.tasks.example import Example

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
    guarded = replace(
        perturbation, find=_guarded_find(perturbation.find, path, perturbation.carries),
        start=_guarded_find(perturbation.start, path, False, "start"), twins=_guarded_twins(perturbation.twins, path),
    )  # fmt: skip
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
        raise UserError(f"--perturbation {path} can't be loaded{_fault(error, path)}") from error
    return module


def _fault(error: Exception, path: Path) -> str:
    """' at line 3: TypeError: what it says.': the end of a sentence on an error that came out of the file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    said = brief(" ".join(str(error).split()), 400)[1:-1].rstrip(".")
    return f"{f' at line {line}' if line else ''}: {type(error).__name__}{f': {said}' if said else ''}."


@contextmanager
def _running(what: str, path: Path) -> Iterator[None]:
    """Around a call of the file's function: an error of it is the user's, with the file's line.

    A lost rank or a full memory isn't: it comes out of the passes that the function asks for.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or befell(error):
            raise
        raise UserError(f"--perturbation {path}: {what} failed{_fault(error, path)}") from error


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
    if perturbation.start is not None and not callable(perturbation.start):
        raise UserError(f"{where}: start of {_VARIABLE} is {perturbation.start!r}; expected a function, as find is.")
    if perturbation.carries and (perturbation.find is None or perturbation.twins is not None):
        raise UserError(f"{where}: {_VARIABLE} carries its deltas, so it needs find and no twins.")
    sizes = {size for known in PERTURBATIONS.values() for size in known.sizes}
    flags = {*sizes, *(flag for known in PERTURBATIONS.values() for flag in known.reads)}
    check_parameters(perturbation.parameters, flags, where)
    own = [name for name, p in perturbation.parameters.items() if type(p.default) in (int, float)]
    _check_names(perturbation.sizes, "sizes", [*own, *sorted(sizes)], where)
    _check_names(perturbation.reads, "reads", sorted(flags), where)


def _check_names(names: Any, field: str, known: Sequence[str], where: str) -> None:
    if not isinstance(names, (tuple, list)):
        raise UserError(f"{where}: {field} is {names!r}; expected a tuple of flags' names, such as ({known[-1]!r},).")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.6)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{where}: {name!r} in {field} is no flag that fits{hint}; choose from {', '.join(known)}.")


def _guarded_find(find: Find | None, path: Path, carries: bool, name: str = "find") -> Find | None:
    """find, whose delta is [T, H] or a UserError and whose rows are zero where nothing may move.

    carries: its delta is then asked for its gradient, whatever graph the file gave it. name: of the function.
    """
    if find is None:
        return None

    def checked(
        shared: SharedPass | None, row: PackedRow, clean_TH: Tensor, settings: PerturbSettings, noise: Noise
    ) -> Tensor:
        with _running(name, path):
            delta = find(shared, row, clean_TH, settings, noise)
        shape = tuple(delta.shape) if isinstance(delta, torch.Tensor) else type(delta).__name__
        if shape != tuple(clean_TH.shape):
            raise UserError(
                f"--perturbation {path}: {name} returned {shape}; expected a tensor of clean_TH's shape "
                f"{tuple(clean_TH.shape)}."
            )
        with _running(name, path):  # on another device, or of no numbers
            delta = movable_only(delta.detach() if carries else delta, row)
            return delta.requires_grad_() if carries else delta

    return checked


def _guarded_twins(twins: Twins | None, path: Path) -> Twins | None:
    """twins, which gives each example one Twin or a UserError."""
    if twins is None:
        return None

    def checked(examples: Sequence[Example], settings: PerturbSettings, noise: Noise) -> list[Twin]:
        with _running("twins", path):
            found = twins(examples, settings, noise)
        if not isinstance(found, list | tuple) or len(found) != len(examples):
            shown = f"{len(found)} of them" if isinstance(found, list | tuple) else type(found).__name__
            raise UserError(f"--perturbation {path}: twins returned {shown}; expected a list, a Twin for each of the "
                            f"{len(examples)} examples.")  # fmt: skip
        with _running("twins", path):
            plain = [_plain_twin(twin, path) for twin in found]
        for example, twin in zip(examples, plain, strict=True):
            _check_tokens(twin, example, settings, path)
        return plain

    return checked


def _plain_twin(twin: Any, path: Path) -> Twin:
    """The Twin with lists of numbers and truth values, whatever arrays or tensors the file gave; else a UserError."""
    try:
        ids, movable = _items(twin.context_ids), _items(twin.movable)
        at = twin.prompt_at if twin.prompt_at is None else operator.index(twin.prompt_at)
        fits = isinstance(twin, Twin) and 0 < len(ids) == len(movable)
    except (AttributeError, TypeError):
        fits = False
    if not fits or any(type(token) is not int for token in ids) or any(type(moves) is not bool for moves in movable):
        shown = brief(" ".join(repr(twin).split()))[1:-1]
        raise UserError(
            f"--perturbation {path}: twins returned {shown}; expected a Twin of one token or more, whole numbers, "
            "and movable for each of them, True or False."
        )
    return Twin(ids, movable, at)


def _items(values: Any) -> list[Any]:
    """Python's own numbers and truth values of a sequence, of an array or of a tensor."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return [value.item() if hasattr(value, "item") else value for value in values]


def _check_tokens(twin: Twin, example: Example, settings: PerturbSettings, path: Path) -> None:
    """UserError for tokens that the model doesn't have, and for more of them than fit."""
    vocabulary, room = settings.vocabulary, settings.room
    strange = [token for token in twin.context_ids if vocabulary is not None and not 0 <= token < vocabulary]
    if strange:
        assert vocabulary is not None
        raise UserError(
            f"--perturbation {path}: twins returned token {strange[0]} for row {example.index}; expected the model's "
            f"token ids, 0 to {vocabulary - 1}."
        )
    count = len(twin.context_ids)
    if room is not None and (most := room - example.path_length + len(example.context_ids)) < count:
        raise UserError(
            f"--perturbation {path}: twins returned {count} tokens for row {example.index}; at most {most} fit between "
            "the prompt and the answers, so shorten the Twin."
        )
