"""The command line: RunConfig's fields as flags, --config FILE, and what was given explicitly."""

import argparse
import dataclasses
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ptp_ds.config.checks import require_valid
from ptp_ds.config.presets import PRESETS, with_preset
from ptp_ds.config.run_config import BEFORE, GROUPS, RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import brief, in_moved_run, nearest, require_writable, write_text
from ptp_ds.ranks.log import get_logger
from ptp_ds.redact import HIDDEN, redacted
from ptp_ds.settings_file import read_settings

log = get_logger(__name__)
_ITS_OWN = ("output_dir", "resume", "push_to_hub")  # settings of one run that another one mustn't take over


class _Once(argparse._StoreAction):
    """argparse's own store; a flag of several values is refused where it comes twice, of which the last would count.

    A flag of one value may come again, and the last one counts: scripts put a user's flags behind their own.
    instead: for the message, what to do.
    """

    def __init__(self, *args: Any, instead: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instead = instead

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        if self.nargs is not None and getattr(namespace, self.dest, argparse.SUPPRESS) is not self.default:
            instead = self.instead or f"give all values behind one {option_string}"
            parser.error(f"{option_string} comes twice; {instead}")
        super().__call__(parser, namespace, values, option_string)


class StrictParser(argparse.ArgumentParser):
    """argparse whose errors are ValueErrors, one sentence each, and which loses no value of a flag (_Once)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own; what is no flag is refused with the flag that it may stand for."""
        values, rest = self.parse_known_args(args, namespace)
        if rest:
            known = [word for action in self._actions for word in action.option_strings]
            raise UserError(f"Unknown argument {rest[0]!r}{nearest(rest[0].split('=')[0], known)}. See --help.")
        return values

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[:1].upper()}{message[1:]}. See --help.")


def base_type(field: dataclasses.Field) -> type:
    """int, float or str: what a setting's value is, where it has one."""
    names = str(field.type).replace("None", "").strip(" |")
    return {"int": int, "float": float, "str": str}[names if not isinstance(field.type, type) else field.type.__name__]


def build_parser(description: str, perturbation: str | None = None) -> argparse.ArgumentParser:
    """The parser of scripts/train.py, made from RunConfig's fields. perturbation: whose own parameters --help tells."""
    parser = StrictParser(
        usage="%(prog)s [flags]", description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    groups = {name: parser.add_argument_group(name, said) for name, said in GROUPS.items()}
    for field in dataclasses.fields(RunConfig):
        group = groups[field.metadata["group"]]
        shown = "" if field.default is None else f" (default: {field.default})"
        text = (field.metadata["help"] + shown).replace("%", "%%")
        if field.name == "perturbation_args":
            text += _own_parameters(perturbation).replace("%", "%%")
            group.add_argument(f"--{field.name}", nargs="+", action="extend", metavar="NAME=VALUE", help=text)
            continue
        if field.name == "seeds":
            group.add_argument("--seeds", nargs="+", metavar="SEED", help=text)
            continue
        if field.name == "report_to":
            group.add_argument("--report_to", nargs="+", metavar="TRACKER", help=text)
            continue
        kind, choices = base_type(field), field.metadata["choices"]
        shape = {"metavar": {int: "N", float: "X"}.get(kind, "NAME")} if choices is None else {"choices": choices}
        group.add_argument(f"--{field.name}", type=kind, help=text, **shape)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file with any of these settings, or a run's "
                        "config.json, whose output_dir, resume and push_to_hub are left out; flags win over "
                        "it")  # fmt: skip
    parser.add_argument("--dump_config", metavar="FILE", help="write the settings as a file for --config, those that "
                        "are as usual as comments, without output_dir, resume and push_to_hub, and train nothing; - "
                        "for standard output")  # fmt: skip
    parser.add_argument("--list_families", action="store_true", help="print the model families that the tests prove")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    return parser


def _own_parameters(perturbation: str | None) -> str:
    """For --help: the parameters of a perturbation file; '' without one."""
    if perturbation is None:
        return ""
    from ptp_ds.perturb.custom import choose_perturbation
    from ptp_ds.perturb.parameters import describe_parameters

    chosen = choose_perturbation(perturbation).perturbation
    return f". {perturbation}: {describe_parameters(chosen.parameters if chosen is not None else {})}"


def named_file(argv: Sequence[str]) -> str | None:
    """The .py file that --perturbation names on a command line that asks for --help; only then is it run this early."""
    if not {"-h", "--help"} & set(argv):
        return None
    parser = StrictParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--perturbation")
    found = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].perturbation
    return found if found is not None and found.endswith(".py") else None


def given_settings(argv: Sequence[str], description: str = "") -> dict[str, Any]:
    """What flags and --config FILE say, flags first, before any check across settings. Raises ValueError."""
    given = vars(build_parser(description, named_file(argv)).parse_args(argv))
    for name in ("local_rank", "list_families", "dump_config"):
        given.pop(name, None)
    if "perturbation_args" in given:
        given["perturbation_args"] = shlex.join(given["perturbation_args"])
    for name in {"seeds", "report_to"} & given.keys():
        given[name] = " ".join(given[name])
    file = given.pop("config", None)
    merged = {**(read_config(file) if file else {}), **given}
    for name, value in merged.items():
        if file and name not in given and isinstance(value, str) and HIDDEN in value:
            raise UserError(f"--config {file}: {name!r} held a secret, which is not on record; give --{name}.")
    return merged


def parse_run(argv: Sequence[str], description: str = "") -> tuple[RunConfig, set[str]]:
    """The configuration from flags and --config FILE, and the names that were given explicitly. Raises ValueError."""
    merged = given_settings(argv, description)
    config = RunConfig(**with_preset(merged))
    require_valid(config)
    return config, set(merged)


def _of_a_run(record: dict[str, Any], file: str) -> Any:
    """The settings on a run's config.json that its defaults and preset don't give anyway, without those that belong to
    that run alone; says so.
    """
    settings = record["run"]
    if not isinstance(settings, dict):
        raise UserError(
            f"--config {file}: 'run' is {brief(settings)}; expected a run's config.json, or settings alone."
        )
    log.info("settings of the run in %s, without its %s", file, f"{', '.join(_ITS_OWN[:-1])} and {_ITS_OWN[-1]}")
    settings, preset = {**BEFORE, **settings}, settings.get("preset")
    settings |= _in_its_folder(settings, Path(file).parent)
    usual = vars(RunConfig()) | PRESETS.get(preset if isinstance(preset, str) else "", {})
    absent = object()
    return {n: value for n, value in settings.items() if n not in _ITS_OWN and value != usual.get(n, absent)}


def _in_its_folder(settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """Data and template that the run kept in its own folder, as Python's train does, by where that folder is now."""
    task = settings.get("task")
    said = {"data_dir": settings.get("data_dir"), "task": task if str(task).endswith(".json") else None}
    found = {name: in_moved_run(path, settings.get("output_dir"), folder) for name, path in said.items()}
    return {name: path for name, path in found.items() if path is not None}


def read_config(file: str) -> dict[str, Any]:
    """The settings that --config FILE gives. Raises UserError for what is no setting, or not of its type."""
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    values = read_settings(file, f"--config {file}") or {}
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: expected settings, a name and a value each, in YAML or JSON.")
    if "run" in values:
        values = _of_a_run(values, file)
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"--config {file}: unknown key {brief(name)}{nearest(name, list(fields))}.")
        require_type(f"--config {file}", name, value)
    return values


def require_type(where: str, name: str, value: Any) -> None:
    """UserError for a setting from a file that isn't of its flag's type or none of its choices."""
    field = next(field for field in dataclasses.fields(RunConfig) if field.name == name)
    wanted, choices = base_type(field), field.metadata["choices"]
    fits = isinstance(value, (int, float) if wanted is float else wanted) and not isinstance(value, bool)
    fits = fits and not (isinstance(value, int) and abs(value) >= 1 << 63)
    if not fits and not (value is None and field.default is None):
        raise UserError(f"{where}: {name!r} must be {wanted.__name__}, not {brief(value)}.")
    if choices and value is not None and value not in choices:
        raise UserError(f"{where}: {name!r} is {brief(value)}; choose from {', '.join(choices)}.")


def dumped_to(argv: Sequence[str]) -> str | None:
    """The file that --dump_config names, None without it."""
    parser = StrictParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dump_config")
    found: str | None = parser.parse_known_args(argv)[0].dump_config
    return found


def settings_text(run: RunConfig) -> str:
    """The run's settings as YAML, group by group; those that are as usual stand in comments, secrets are hidden, and
    those that belong to one run (_ITS_OWN) are left out, which the text says.
    """
    import yaml

    usual = vars(RunConfig()) | PRESETS.get(run.preset or "", {})
    lines = [
        "# Settings of a run, for --config; what is a comment is as usual.",
        f"# Not in here are {', '.join(_ITS_OWN[:-1])} and {_ITS_OWN[-1]}, one run's own: give them as flags.",
    ]
    for group, said in GROUPS.items():
        lines += ["", f"# {group}: {said}"]
        for field in dataclasses.fields(RunConfig):
            if field.metadata["group"] != group or field.name in _ITS_OWN:
                continue
            value = redacted({field.name: getattr(run, field.name)})
            line = yaml.safe_dump(value, default_flow_style=False, allow_unicode=True, width=1 << 20).rstrip("\n")
            same = getattr(run, field.name) == usual[field.name]
            lines.append(textwrap.indent(line, "# ") if same else line)
    return "\n".join(lines) + "\n"


def dump_config(run: RunConfig, file: str) -> None:
    """Writes settings_text to a file, or, for -, to standard output."""
    if file == "-":
        sys.stdout.write(settings_text(run))
        return
    path = require_writable("--dump_config", file)
    write_text(path, settings_text(run))
