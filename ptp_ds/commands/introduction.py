"""What scripts/train.py says before it loads the model: the run in a few lines, a fact or two each."""

import os
import re
from dataclasses import asdict

import torch

from ptp_ds.config.presets import describe_preset
from ptp_ds.config.run_config import RunConfig
from ptp_ds.files import brief, listed
from ptp_ds.hosts.environment import allocator_settings
from ptp_ds.models.stored import stored_numbers
from ptp_ds.precision import PRECISION_OF
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.redact import redacted
from ptp_ds.training.prepared import Prepared

_REASON = re.compile(r" \(from [^)]*\)$")  # a flag that the lines above tell, or the width
_UNITS = {"relative": "in mean embedding norms", "l2": "l2 norms", "coordinate": "a coordinate"}
_START = {"vocab": "vocabulary rows", "labels": "the class words", "adapter": "--init_adapter"}


def introduction(prepared: Prepared, ranks: Ranks) -> list[str]:
    """The lines, in the order in which a person asks. All ranks may call it; reads the headers of the weight files."""
    run, dtype = prepared.run, PRECISION_OF[prepared.resolved.dtype]
    numbers = _count(stored_numbers(prepared.source.folder))
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    lines = [
        f"{prepared.task.name} on {run.model}: {prepared.source.config.model_type} of {numbers} parameters in {dtype}, "
        f"predicts by {prepared.source.head_plan.kind}",
        f"ranks: {ranks.world} on {device}, ZeRO-{prepared.resolved.stage}",
        f"rows: {_rows(prepared)}",
        f"steps: {_steps(prepared, ranks)}",
        f"perturbation: {_perturbation(run)}",
    ]
    if run.preset is not None:
        lines.append(describe_preset(run.preset, asdict(run)))
    made = f", through an MLP of {run.prompt_mlp}" if run.prompt_mlp is not None else ""
    if run.prompt_residual is not None:
        made = f", with a residual bottleneck of {run.prompt_residual}"
    start = brief(redacted(run.init_text)) if run.prompt_init == "text" else _START[run.prompt_init]
    lines.append(f"prompt: {run.prompt}, {run.prompt_length} tokens, starts as {start}{made}")
    if ranks.device.type == "cuda" and (settings := allocator_settings(os.environ)):
        lines.append(f"GPU allocator: {settings}")
    if prepared.resolved.notes:
        lines.append(f"auto: {', '.join(_note(note) for note in prepared.resolved.notes)}")
    return [lines[0], *(f"  {line}" for line in lines[1:])]


def _count(numbers: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if numbers >= size:
            return f"{numbers / size:.1f} {letter}"
    return str(numbers)


def _rows(prepared: Prepared) -> str:
    examples = prepared.examples
    counts = f"{len(examples.train)} train, {len(examples.select)} selection, {len(examples.evaluation)} evaluation"
    if examples.predict:
        counts += f", {len(examples.predict)} to predict"
    if not examples.truncated:
        counts += "; none shortened"
    else:
        counts += f"; {examples.truncated} of them longer than the context, shortened in '{prepared.task.truncate}'"
    if some := examples.undecided:
        counts += f"; {len(some)} with a right and a wrong answer of the same tokens ({listed(some, 3)})"
    return counts


def _steps(prepared: Prepared, ranks: Ranks) -> str:
    run = prepared.run
    if run.tokens_per_step is not None:
        return f"{run.max_steps} of {run.tokens_per_step} tokens over all ranks"
    epochs = run.max_steps / run.batch_repeats * run.batch_size / len(prepared.examples.train)
    parts = f"{run.batch_size // ranks.world} a rank" if ranks.world > 1 else ""
    if run.gradient_accumulation_steps > 1:
        parts += f"{', ' if parts else ''}in {run.gradient_accumulation_steps} micro-batches"
    return f"{run.max_steps} of {run.batch_size} rows{f' ({parts})' if parts else ''}, {epochs:.1f} epochs"


def _perturbation(run: RunConfig) -> str:
    if run.active_perturbation is None:
        off = "" if run.perturbation == "none" else f" ({run.perturbation} is off, by a size or a lambda of 0)"
        return f"none{off}"
    held = {**asdict(run), "alpha": run.step_length, **run.own_settings}
    read = dict.fromkeys([*run.active_perturbation.sizes, *run.active_perturbation.reads, *run.own_settings])
    sizes = "".join(f", {name} {_short(held[name])}" for name in read if held[name] is not None)
    unit = f" ({_UNITS[run.units]})" if {"sigma", "epsilon"} & set(read) else ""
    target = f", on {run.target}" if run.target != "input" else ""
    fixed = (
        ", the clean prediction fixed" if run.divergence_gradient == "clean_fixed" and run.divergence != "ce" else ""
    )
    falls = "" if run.reg_schedule == "constant" else f", falling to 0 ({run.reg_schedule})"
    of = " in their label" if run.confidence_in == "label" else ""
    sure = f" of rows with a confidence of {_short(run.min_confidence)} or more{of}" if run.min_confidence else ""
    weight = f"lambda {_short(run.reg_weight)}{falls}"
    return f"{run.perturbation}{sizes}{unit}{target}; divergence {run.divergence}{fixed}{sure}, {weight}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _note(note: str) -> str:
    """`name = value (reason)` of what was "auto", as `name value (reason)`."""
    name, _, value = _REASON.sub("", note).partition(" = ")
    return f"{name.removeprefix('zero_optimization.')} {value}"
