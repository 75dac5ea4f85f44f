"""A run's own record: config.json at its start, result.json and the adapter's card at its end, versions in all."""

import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ptp_ds.adapters.origin import data_record, model_record
from ptp_ds.config.presets import preset_effect
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.evaluate import Evaluation
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.progress import Progress, median_or_zero

_VERSIONED = ("deepspeed", "transformers", "datasets", "sentencepiece", "tensorboard", "safetensors", "ptp_ds")


def versions() -> dict[str, str | None]:
    """Versions of python, of the packages a result depends on, and of this project's git revision where it has one."""
    # torch by its build, too: +cpu, +cu130
    found: dict[str, str | None] = {"python": sys.version.split()[0], "torch": torch.__version__}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        found["git_revision"] = done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        found["git_revision"] = None
    return found


def config_record(prepared: Prepared, ranks: Ranks) -> dict[str, Any]:
    """config.json: settings, the resolved DeepSpeed configuration, the task, data and versions."""
    run, examples = prepared.run, prepared.examples
    return {
        "run": asdict(run), "deepspeed": prepared.resolved.config, "auto": prepared.resolved.notes,
        "preset": preset_effect(run.preset, asdict(run)), "task": prepared.task.spec(),
        "model_folder": str(prepared.source.folder), "world_size": ranks.world,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "rows": {"train": len(examples.train), "select": len(examples.select), "eval": len(examples.evaluation)},
        "training_data_sha256": prepared.identity["training data"],
        "perturbation_sha256": run.chosen_perturbation.sha256, "perturbation_args": run.own_settings,
        "versions": versions(),
    }  # fmt: skip


def result_record(
    prepared: Prepared, ranks: Ranks, progress: Progress, result: Evaluation, untrained: Evaluation, peak_bytes: int
) -> dict[str, Any]:
    """result.json: the metrics of the best prompt on --eval_split, what they cost, and every setting.

    untrained: those of the prompt that training began with. Its `rows` are digests by what the rows are for.
    """
    run = prepared.run
    return {
        "task": prepared.task.name, "model": run.model, "perturbation": run.chosen_perturbation.name,
        "prompt": run.prompt, "seed": run.seed, "world_size": ranks.world, "steps": progress.step,
        "metrics": result.metrics,
        "untrained": untrained.metrics, "untrained_cross_entropy": untrained.cross_entropy,
        "majority": result.majority, "step_seconds_median": median_or_zero(progress.step_seconds),
        "tokens_per_second": median_or_zero(progress.tokens_per_second), "peak_memory_bytes": peak_bytes,
        "eval_split": run.eval_split, "eval_examples": result.examples, "eval_cross_entropy": result.cross_entropy,
        "best_step": progress.best_step, "select_metrics": progress.best.metrics if progress.best else {},
        "settings": asdict(run), "training_data_sha256": prepared.identity["training data"],
        "rows": dict(prepared.digests),
    }  # fmt: skip


def card_record(prepared: Prepared, result: dict[str, Any]) -> dict[str, Any]:
    """The adapter's card: what the commands that read it need to know of its run. result: see result_record."""
    run, source = prepared.run, prepared.source
    return {
        "task": prepared.task.spec(), "head": asdict(source.head_plan), "model": model_record(run, source),
        "data": data_record(run), "result": result, "versions": versions(),
    }  # fmt: skip
