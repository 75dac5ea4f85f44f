"""--seeds and --population: the members of a population, each a run of its own that shares what all of them share."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from ptp_ds.config.checks import require_valid
from ptp_ds.config.flags import require_type
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import brief, listed, nearest, plain_name
from ptp_ds.settings_file import read_settings

VARIED = (
    "seed", "lr", "weight_decay", "max_grad_norm", "warmup_steps", "lr_schedule", "schedule_steps", "reg_weight",
    "reg_warmup_steps", "reg_schedule", "min_confidence", "confidence_in", "sigma", "epsilon", "alpha", "divergence",
    "divergence_gradient", "mask_share", "a2t_share",
    "prompt_init", "init_text", "init_adapter", "prompt_length", "holdout", "max_length", "task", "data_dir", "dataset",
    "patience", "train_split", "eval_split", "select_split", "predict_split",
)  # fmt: skip
_MOST = 1000  # members
NO_FP16 = "scales one run's loss; use bf16 or fp32 with --seeds and --population."
_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")


def is_population(run: RunConfig) -> bool:
    """Whether the run trains several prompts."""
    return run.seeds is not None or run.population is not None


def members_of(run: RunConfig, changes: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, RunConfig]:
    """Each member's own run, by its name, in order; output_dir and resume are left to the caller.

    changes: what differs by member, where neither --seeds nor --population says it. Raises UserError for
    what is no list of seeds or members, and for settings that a member can't have of its own.
    """
    if run.seeds is not None and run.population is not None:
        raise UserError("--seeds and --population both say who the members are; give one of them.")
    if run.resume not in (None, "auto"):
        raise UserError("--resume of several prompts is auto: each goes on from its own folder in --output_dir.")
    if run.precision == "fp16":
        raise UserError(f"--precision fp16 {NO_FP16}")
    if run.push_to_hub is not None:
        raise UserError(
            "--push_to_hub pushes one prompt; leave it out with --seeds and --population, and push the member that you "
            "choose by `ptp push --adapter OUTPUT_DIR/members/NAME OWNER/NAME`."
        )
    alone = replace(run, seeds=None, population=None, output_dir=None, resume=None)
    if run.seeds is not None:
        changes = {f"seed-{seed}": {"seed": seed} for seed in seeds_of(run.seeds, "--seeds")}
    elif run.population is not None:
        changes = _read_members(run.population)
    assert changes is not None
    found = {}
    for name, own in changes.items():
        try:
            found[name] = replace(alone, **own)
            require_valid(found[name])
        except UserError as error:
            raise UserError(f"Member {name}: {error}") from None
    if len({member.perturbs for member in found.values()}) > 1:
        off = [name for name, member in found.items() if not member.perturbs]
        raise UserError(
            f"Members {listed(off)} have no perturbation, by a size or a lambda of 0, and others have one; train them "
            "in another population."
        )
    return found


def seeds_of(text: str, where: str) -> list[int]:
    """Numbers and ranges, such as 0-9 or 0 1 2; UserError, which begins with `where`, for anything else."""
    found: list[int] = []
    for word in text.split():
        both = _RANGE.fullmatch(word)
        first, last = (int(both[1]), int(both[2])) if both else (int(word), int(word)) if _is_number(word) else (1, 0)
        if not first <= last < first + _MOST:
            raise UserError(f"{where} {brief(text)}: {word!r} is no seed; expected numbers and ranges such as 0-9.")
        found += range(first, last + 1)
    if not found or len(set(found)) < len(found) or len(found) > _MOST:
        raise UserError(f"{where} {brief(text)}: expected 1 to {_MOST} seeds, each once.")
    return found


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 10


def _read_members(file: str) -> dict[str, dict[str, Any]]:
    """{name: what differs from the flags} of a JSON or YAML list."""
    where = f"--population {file}"
    given = read_settings(file, where)
    if not isinstance(given, Sequence) or isinstance(given, str) or not 1 <= len(given) <= _MOST:
        raise UserError(f"{where}: expected a list of 1 to {_MOST} members, each with a name and what differs.")
    found: dict[str, dict[str, Any]] = {}
    for number, member in enumerate(given, start=1):
        if not isinstance(member, Mapping) or "name" not in member:
            raise UserError(f"{where}: member {number} is {brief(member)}; expected an object with a name.")
        name = plain_name(member["name"], f"{where}: the name of member {number}")
        if name in found:
            raise UserError(f"{where}: two members are named {name!r}; name each its own.")
        found[name] = {key: value for key, value in member.items() if key != "name"}
        for key, value in found[name].items():
            _require_own(f"{where}: {name}", key, value)
    return found


def _require_own(where: str, name: str, value: Any) -> None:
    """UserError for what a member can't have of its own, or not with this value."""
    if name not in {field.name for field in fields(RunConfig)}:
        raise UserError(f"{where}: unknown key {brief(name)}{nearest(name, list(VARIED))}.")
    if name not in VARIED:
        raise UserError(
            f"{where}: --{name} is the same for all members, a flag of the job; they differ in {', '.join(VARIED)}."
        )
    require_type(where, name, value)
