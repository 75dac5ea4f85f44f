"""Whether a RunConfig holds together: ranges, contradictions, and flags that nothing reads."""

import math
from dataclasses import fields
from typing import Any

from ptp_ds.config.presets import PRESETS
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError


def require_valid(run: RunConfig) -> None:
    """Raises ValueError for the first field that is out of range or contradicts another."""
    _ = run.own_settings
    _check_ranges(run)
    _check_pairs(run)


def _check_ranges(run: RunConfig) -> None:
    for name in ("prompt_length", "batch_size", "gradient_accumulation_steps", "max_steps", "ascent_steps",
                 "log_every", "eval_tokens", "keep_checkpoints", "a2t_neighbours"):  # fmt: skip
        _require(getattr(run, name) >= 1, name, getattr(run, name), "a whole number of 1 or more")
    for name in ("reg_warmup_steps", "warmup_steps", "eval_every", "save_every", "patience", "seed"):
        count = getattr(run, name)
        _require(count is None or count >= 0, name, count, "a whole number of 0 or more")
    for name in ("mask_share", "a2t_share"):
        _require(0 <= getattr(run, name) <= 1, name, getattr(run, name), "a share between 0 and 1")
    _require(0 <= run.a2t_min_cosine < 1, "a2t_min_cosine", run.a2t_min_cosine, "a cosine from 0 up to below 1")
    for name in ("reg_weight", "sigma", "epsilon", "weight_decay", "max_grad_norm", "stall_timeout"):
        _require(0 <= getattr(run, name) < math.inf, name, getattr(run, name), "a finite number of 0 or more")
    _require(0 < run.lr < math.inf, "lr", run.lr, "a finite number above 0")
    _require(run.alpha is None or 0 < run.alpha < math.inf, "alpha", run.alpha, "a finite number above 0")
    _require(0 <= run.min_confidence < 1, "min_confidence", run.min_confidence, "a probability from 0 up to below 1")
    _require(0 <= run.average < 1, "average", run.average, "a decay from 0 up to below 1")
    _require(0 < run.holdout < 1, "holdout", run.holdout, "a share between 0 and 1")
    _require(run.max_length is None or run.max_length > run.prompt_length, "max_length", run.max_length,
             f"more than the prompt's {run.prompt_length} tokens")  # fmt: skip
    for name in ("tokens_per_step", "schedule_steps", "prompt_mlp", "prompt_residual", "chunk_tokens"):
        count = getattr(run, name)
        _require(count is None or count >= 1, name, count, "a whole number of 1 or more")


def _check_pairs(run: RunConfig) -> None:
    if run.data_dir is not None and run.dataset is not None:
        raise UserError("Can't read both --data_dir and --dataset; choose one.")
    if run.eval_split == run.train_split:
        raise UserError(f"--eval_split and --train_split are both {run.eval_split!r}; report another split.")
    if run.select_split is not None and run.select_split == run.eval_split:
        raise UserError(
            f"--select_split and --eval_split are both {run.eval_split!r}: the best prompt must not be chosen "
            "on the split that is reported; leave --select_split out to hold rows out of the training split."
        )
    if (run.prompt_init == "adapter") != (run.init_adapter is not None):
        raise UserError("--prompt_init adapter and --init_adapter go together; give both or neither.")
    if run.init_text is not None and run.prompt_init != "text":
        raise UserError(f"--init_text is where --prompt_init text begins, not {run.prompt_init}; give both or neither.")
    if run.prompt_residual is not None and (run.prompt_mlp is not None or run.prompt != "soft"):
        other = "--prompt_mlp" if run.prompt_mlp is not None else f"--prompt {run.prompt}"
        raise UserError(f"--prompt_residual is for a soft prompt without an MLP; leave it or {other} out.")
    perturbation = run.chosen_perturbation.perturbation
    if run.target != "input" and (run.prompt != "soft" or (perturbation is not None and perturbation.in_text)):
        raise UserError(
            f"--target {run.target} is for soft prompts and deltas in embedding space; leave it out with --prompt "
            f"{run.prompt} --perturbation {run.perturbation}."
        )
    if run.resume == "auto" and run.output_dir is None:
        raise UserError("--resume auto needs the --output_dir of the run that it continues.")


def without_effect(run: RunConfig, explicit: set[str]) -> list[str]:
    """Settings that were given but that nothing reads: by the chosen perturbation, or by none where it is turned off.

    explicit: those that the user named; what differs from its default was given as well, by a preset or a program.
    """
    from ptp_ds.perturb import PERTURBATIONS

    perturbation, chosen = run.active_perturbation, run.chosen_perturbation.perturbation
    unread = {name for known in PERTURBATIONS.values() for name in (*known.sizes, *known.reads)}
    unread -= {*perturbation.sizes, *perturbation.reads} if perturbation is not None else set()
    if perturbation is None or perturbation.find is None:
        unread |= {"units", "target"}
    if perturbation is None:
        unread |= {
            "reg_weight", "reg_warmup_steps", "reg_schedule", "min_confidence", "confidence_in", "divergence",
            "divergence_gradient",
        }  # fmt: skip
        if chosen is not None:  # what turns it off has that effect
            unread -= {name for name in unread & {"reg_weight", *chosen.sizes} if not getattr(run, name)}
    if run.divergence == "ce":  # of the perturbed prediction alone
        unread.add("divergence_gradient")
    if not run.min_confidence:
        unread.add("confidence_in")
    if run.tokens_per_step is not None:
        unread.add("batch_size")
    if run.select_split is not None:
        unread.add("holdout")
    if run.lr_schedule == run.reg_schedule == "constant":
        unread.add("schedule_steps")
    if not run.eval_every:
        unread.add("patience")
    if run.push_to_hub is None:
        unread.add("hub_visibility")
    changed = {field.name for field in fields(run) if getattr(run, field.name) != field.default}
    return sorted(unread & (explicit | changed))


def describe_unread(run: RunConfig, explicit: set[str]) -> list[str]:
    """without_effect as sentences: one for each cause, those that a preset set apart from those that were given."""
    causes: dict[tuple[str, bool], list[str]] = {}
    for name in without_effect(run, explicit):
        of_preset = name not in explicit and name in PRESETS.get(run.preset or "", {})
        causes.setdefault((_cause(run, name), of_preset), []).append(name if of_preset else f"--{name}")
    sentences = []
    for (cause, of_preset), names in causes.items():
        subject = ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
        source = f" of --preset {run.preset}" if of_preset else ""
        sentences.append(f"{subject}{source} {'have' if len(names) > 1 else 'has'} no effect with {cause}")
    return sentences


def _cause(run: RunConfig, name: str) -> str:
    """What keeps a setting from having an effect."""
    beside = {
        "batch_size": "tokens_per_step", "holdout": "select_split", "schedule_steps": "lr_schedule constant",
        "patience": "eval_every 0",
    }  # fmt: skip
    if name in beside:
        return f"--{beside[name]}"
    if name == "hub_visibility":
        return "no --push_to_hub"
    if name == "confidence_in" and run.perturbs:
        return "--min_confidence 0"
    if name == "divergence_gradient" and run.perturbs:
        return "--divergence ce"
    if run.chosen_perturbation.perturbation is not None and not run.perturbs:
        return "--reg_weight 0" if not run.reg_weight else f"a --perturbation {run.perturbation} of size 0"
    return f"--perturbation {run.perturbation}"


def unsuited(run: RunConfig, explicit: set[str]) -> list[str]:
    """A sentence for each setting, given or by default, that doesn't suit the others."""
    found = []
    if run.prompt_mlp is not None and "lr" not in explicit:
        found.append(
            f"--prompt_mlp trains more than a prompt: --lr {run.lr}, the default, is likely too high, try 0.001"
        )
    idle = run.max_steps - run.schedule_end
    if idle > 0 and run.lr_schedule != "constant":
        found.append(
            f"--schedule_steps {run.schedule_end} ends before --max_steps {run.max_steps}: the learning rate is 0 in "
            f"the last {idle} steps, which train nothing; give --schedule_steps {run.max_steps} or more"
        )
    return found


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise UserError(f"--{name} is {value}; expected {expected}.")
