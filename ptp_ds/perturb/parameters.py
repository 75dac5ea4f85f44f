"""Parameters that a perturbation file declares for itself, and their values from --perturbation_args NAME=VALUE."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import brief, nearest

Value = bool | int | float | str
_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


@dataclass(frozen=True)
class Parameter:
    """What a user may set. default: its value otherwise, and its type: bool, int, float or str. help: for --help."""

    default: Value
    help: str = ""


def check_parameters(parameters: Any, flags: Any, where: str) -> None:
    """UserError for a declaration that isn't {"name": Parameter(default, help)}, or that takes a flag's name."""
    if not isinstance(parameters, Mapping):
        raise UserError(f'{where}: parameters is {brief(parameters)}; expected {{"name": Parameter(default, "help")}}.')
    for name, declared in parameters.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{where}: a parameter is named {brief(name)}; expected a name such as Python's.")
        if name in flags:
            raise UserError(f"{where}: parameter {name!r} has a flag's name; rename it, or name the flag in reads.")
        default = declared.default if isinstance(declared, Parameter) else None
        finite = not isinstance(default, float) or math.isfinite(default)
        if type(default) not in _KINDS or not finite or not isinstance(declared.help, str):
            raise UserError(
                f"{where}: parameter {name!r} is {brief(declared)}; expected Parameter(default, help) with a finite "
                "number, text, True or False, and a text."
            )


def values_of(given: str | None, parameters: Mapping[str, Parameter], where: str) -> dict[str, Value]:
    """Every parameter's value, by name: what `given`, words NAME=VALUE, says, else its default.

    where: the perturbation, for messages. Raises UserError for an unknown name, one that comes twice, a value of
    another type, and words of another form.
    """
    found: dict[str, Value] = {}
    for word in _words(given or ""):
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise UserError(f"--perturbation_args {brief(word)[1:-1]}: expected NAME=VALUE, such as keep=0.9.")
        if name not in parameters:
            known = f"it has {', '.join(parameters)}" if parameters else "it declares none"
            raise UserError(f"{where} has no parameter {brief(name)}{nearest(name, list(parameters))}; {known}.")
        if name in found:
            raise UserError(f"--perturbation_args gives {name} twice; give it once.")
        found[name] = _value(name, text, parameters[name])
    return {name: found.get(name, declared.default) for name, declared in parameters.items()}


def _words(given: str) -> list[str]:
    try:
        return shlex.split(given)
    except ValueError:
        raise UserError(f"--perturbation_args {brief(given)}: a quotation mark isn't closed.") from None


def _value(name: str, text: str, declared: Parameter) -> Value:
    """`text` in the type of the parameter's default."""
    kind = type(declared.default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise OverflowError
        return value
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"--perturbation_args {name} is {brief(text)}; expected {_KINDS[kind]}.") from None


def describe_parameters(parameters: Mapping[str, Parameter]) -> str:
    """The parameters for --help: name=default (help), one behind the other."""
    shown = [f"{name}={p.default}" + (f" ({p.help})" if p.help else "") for name, p in parameters.items()]
    return ", ".join(shown) or "none"
