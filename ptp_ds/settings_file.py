"""Files of settings that people write: JSON, or YAML where the name ends in .yaml or .yml.

YAML is read by the core schema of YAML 1.2, which is what JSON can say: `1e-3` is a number, `no` and `on` are words,
dates are text. Nothing else can be built from it, and no alias multiplies what is read.
"""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from ptp_ds.errors import UserError
from ptp_ds.files import brief, parse_json, read_text

_YAML = (".yaml", ".yml")


def read_settings(path: str | Path, where: str) -> Any:
    """The file's value, of JSON's types; UserError, which begins with `where`, for anything else."""
    text = read_text(path, where)
    return parse_yaml(text, where) if Path(path).suffix.lower() in _YAML else parse_json(text, where, once=True)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; UserError, which begins with `where`, for what isn't valid."""
    try:
        return yaml.load(text, Loader=_CoreLoader)
    except _CoreError as error:
        raise UserError(f"{where}: not valid YAML ({error}).") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise UserError(f"{where}: not valid YAML ({brief(error.problem or error.context)[1:-1]}{place}).") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML ({str(error).splitlines()[0]}).") from None
    except RecursionError:
        raise UserError(f"{where}: not valid YAML (nested too deeply).") from None


class _CoreError(Exception):
    """What YAML allows and settings don't."""


class _CoreLoader(yaml.SafeLoader):
    """A SafeLoader of JSON's types alone."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - PyYAML's own form; filled below
    yaml_constructors: dict = {}  # noqa: RUF012

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _CoreError(f"an alias (*name) in line {mark.line + 1}; write the value out")
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]


def _mapping(loader: Any, node: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise _CoreError(f"the key {brief(key)} in line {line} is no text; quote it")
        if key in found:
            raise _CoreError(f"the key {brief(key)} comes twice, line {line}")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


def _number(loader: Any, node: Any) -> int | float:
    try:
        value = float(node.value) if set(node.value) & set(".eE") else int(node.value)
    except ValueError:  # Python's own limit on digits
        raise _CoreError(f"a number of thousands of digits in line {node.start_mark.line + 1}") from None
    if not math.isfinite(value):
        raise _CoreError(f"the number {brief(node.value)[1:-1]} in line {node.start_mark.line + 1} is too large")
    return value


def _unknown(loader: Any, node: Any) -> Any:
    raise _CoreError(f"the tag {node.tag} in line {node.start_mark.line + 1}; settings are plain values")


_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_T = "tag:yaml.org,2002:"
_CoreLoader.add_implicit_resolver(f"{_T}null", re.compile(r"(~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_CoreLoader.add_implicit_resolver(f"{_T}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
_CoreLoader.add_implicit_resolver(f"{_T}float", _NUMBER, list("-+0123456789."))
_CoreLoader.add_constructor(f"{_T}null", lambda loader, node: None)
_CoreLoader.add_constructor(f"{_T}bool", lambda loader, node: node.value.lower() == "true")
_CoreLoader.add_constructor(f"{_T}float", _number)
_CoreLoader.add_constructor(f"{_T}str", lambda loader, node: str(node.value))
_CoreLoader.add_constructor(
    f"{_T}seq", lambda loader, node: [loader.construct_object(x, deep=True) for x in node.value]
)
_CoreLoader.add_constructor(f"{_T}map", _mapping)
_CoreLoader.add_constructor(None, _unknown)
