"""A whole run: prepared (ptp_ds.prepare), then the backbone is loaded, trained, evaluated and exported."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptp_ds.activations import Activations, memory_budget
from ptp_ds.agreement import fingerprints, require_agreement
from ptp_ds.backbone import Backbone
from ptp_ds.check import checked
from ptp_ds.checkpoint import set_aside, write_json
from ptp_ds.config import RunConfig
from ptp_ds.distributed import Ranks, env_rank, prepare_environment, start_processes, stop_processes
from ptp_ds.engine import Engine
from ptp_ds.evaluate import Evaluation, evaluate, score_examples
from ptp_ds.export import write_adapter
from ptp_ds.families import describe_families
from ptp_ds.faults import LOST_RANK, USER_ERROR, OutputGuard, is_lost_rank, tell
from ptp_ds.frozen_linear import explain_product
from ptp_ds.kernels import explain
from ptp_ds.loading import load_backbone
from ptp_ds.monitor import Monitor, peak_memory_bytes, say
from ptp_ds.perturb.neighbours import Neighbours, vocabulary_of
from ptp_ds.perturb.units import unit_of, vanishes
from ptp_ds.predictions import prediction_lines, write_jsonl
from ptp_ds.prepare import Prepared, prepare
from ptp_ds.presets import describe_preset, preset_effect
from ptp_ds.prompts import empty_prompt, initial_prompt, prompt_mlp, prompt_width
from ptp_ds.prompts.deep import join_deep
from ptp_ds.signals import end_at_once, ignore_stop_signals
from ptp_ds.step import settings_of
from ptp_ds.trainer import Progress, Trainer, median_or_zero, progress_from
from ptp_ds.watchdog import Watchdog

_VERSIONED = ("torch", "deepspeed", "transformers", "datasets", "sentencepiece", "tensorboard", "safetensors")


def initial_values(prepared: Prepared, backbone: Backbone) -> Tensor:
    """[P, H] the prompt's start, an adapter's or the initialiser's; for a deep one [P, D], its keys and values."""
    run = prepared.run
    head = backbone.head
    tensors = {name: tensor.to(backbone.device) for name, tensor in head.start(prepared.config, run.seed).items()}
    if prepared.adapter is not None:
        return head.join(prepared.adapter.to(backbone.device), tensors)
    start = initial_prompt(
        run.prompt_init, run.prompt_length, backbone, prepared.tokenizer, seed=run.seed, text=run.init_text,
        answers=[answer.strip() for answer in prepared.task.answers.values()],
    )  # fmt: skip
    if run.prompt == "soft":
        return head.join(start, tensors)
    return head.join(join_deep(backbone.keys_of(start, head.join(start, tensors))), tensors)


def neighbours_of(prepared: Prepared) -> Neighbours | None:
    """Near words for a perturbation that attacks the text; None for the others."""
    run = prepared.run
    if run.how is None or run.how.attack is None:
        return None
    return Neighbours(vocabulary_of(prepared.tokenizer), run.a2t_neighbours, run.a2t_min_cosine)


def default_output_dir(prepared: Prepared, ranks: Ranks) -> Path:
    """runs/<task>-<perturbation>-<seed>-<time>, by rank 0's clock."""
    run, now = prepared.run, time.localtime(ranks.from_main(int(time.time())))
    stamp = time.strftime("%Y%m%d-%H%M%S", now)
    return Path("runs") / f"{prepared.task.name}-{run.chosen.name}-{run.seed}-{stamp}"


def _introduce(prepared: Prepared, ranks: Ranks) -> None:
    run = prepared.run
    say(
        ranks, f"{prepared.task.name} | {run.model} | {run.perturbation} | {ranks.world} rank(s) on {ranks.device.type}"
    )
    if run.preset is not None:
        say(ranks, f"  {describe_preset(run.preset, asdict(run))}")
    for note in prepared.resolved.notes:
        say(ranks, f"  auto: {note}")
    if prepared.truncated:
        say(ranks, f"  {prepared.truncated} rows were longer than the context: shortened in '{prepared.task.truncate}'")


def open_engine(prepared: Prepared, ranks: Ranks) -> tuple[Engine, Progress]:
    """The backbone, loaded and checked, behind an engine that holds the prompt's start or the checkpoint's state."""
    run, config = prepared.run, prepared.config
    backbone = load_backbone(prepared.folder, prepared.resolved, ranks, prepared.plan, run.kernels)
    backbone.activations = Activations(run.activations, run.chunk_tokens, budget_bytes=memory_budget(ranks.device))
    backbone, refused = checked(backbone)
    backbone.serve(run.prompt, prepared.rows, run.prompt_length)
    if refused:
        say(ranks, f"  generic path, padded and slower: {refused.split(' Use one ')[0]}")
    say(ranks, f"  activations: {backbone.activations.describe()}")
    place = run.kernels, ranks.device, backbone.dtype
    say(ranks, f"  kernels: {explain(*place)}; frozen products: {explain_product(*place)}")
    mlp = prompt_mlp(run.prompt, run.prompt_length, run.prompt_mlp, config)
    beside = backbone.head.rows(prompt_width(run.prompt, config))
    prompt = empty_prompt(run.prompt, run.prompt_length, config, mlp, beside)
    engine = Engine(prompt, backbone, prepared.resolved, ranks, run.weight_decay)
    if prepared.checkpoint is None:
        start = initial_values(prepared, backbone)
        engine.set_prompt(start if mlp is None else mlp.start(start, run.seed))
        return engine, Progress()
    engine.load_state(prepared.checkpoint.tensors)
    progress = progress_from(prepared.checkpoint)
    say(ranks, f"resumed behind step {progress.step}")
    return engine, progress


def train_run(prepared: Prepared, ranks: Ranks, watchdog: Watchdog) -> int:
    """Trains, evaluates and exports; returns the exit code (0, or 128 + signal where a signal stopped it)."""
    run, output_dir = prepared.run, prepared.output_dir or default_output_dir(prepared, ranks)
    _introduce(prepared, ranks)
    output = OutputGuard(ranks, output_dir)
    if ranks.is_main:
        description = describe_run(prepared, ranks)
        with output.writing():
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(output_dir / "config.json", description)
            if prepared.damaged and prepared.checkpoint is not None:
                set_aside(output_dir / "checkpoints", prepared.checkpoint.step)
    output.agree()
    engine, progress = open_engine(prepared, ranks)
    unit = _unit(run, engine.backbone, prepared.resolved.dtype, ranks) if run.perturbs else 1.0
    with output.writing():
        monitor = Monitor(output_dir, ranks, progress.step, run.max_steps)
    output.agree()
    settings = settings_of(run, unit, prepared.mask_id)
    trainer = Trainer(
        run, prepared.task, engine, ranks, settings, prepared.train, prepared.select, monitor, output_dir,
        prepared.identity, neighbours_of(prepared), watchdog,
    )  # fmt: skip
    try:
        trainer.train(progress)
        if progress.stopped_by:
            ignore_stop_signals()
            say(
                ranks,
                f"stopped by signal {progress.stopped_by} after step {progress.step}; saved: --resume auto goes on",
            )
            return 128 + progress.stopped_by
        watchdog.doing("the last evaluation")
        result = _report(prepared, engine, ranks, progress, monitor, output_dir, watchdog)
        _predict(prepared, engine, ranks, progress, output_dir, watchdog)
    finally:
        with output.writing():
            monitor.close()
    output.agree()
    _announce(prepared, ranks, result, progress, output_dir)
    return 0


def _unit(run: RunConfig, backbone: Backbone, dtype: torch.dtype, ranks: Ranks) -> float:
    """What size 1 is in embedding coordinates; says so where the largest size is too small for the dtype."""
    mean_norm = backbone.mean_embedding_norm()
    unit = unit_of(run.units, mean_norm, backbone.width)
    sizes = [getattr(run, name) for name in ("sigma", "epsilon") if run.how and name in run.how.sizes]
    if sizes and vanishes(max(sizes) * unit, mean_norm, dtype):
        say(ranks, f"warning: deltas of norm {max(sizes) * unit:.1e} are mostly lost beside embeddings of norm "
                   f"{mean_norm:.1e} in {dtype}; use --precision fp32 or larger sizes")  # fmt: skip
    return unit


def _report(
    prepared: Prepared, engine: Engine, ranks: Ranks, progress: Progress, monitor: Monitor, output_dir: Path,
    watchdog: Watchdog,
) -> Evaluation:  # fmt: skip
    run = prepared.run
    values = progress.best_prompt
    assert values is not None, "the last step always evaluates"
    result = evaluate(
        engine.backbone, values, prepared.evaluation, prepared.task, ranks, run.eval_tokens, watchdog.beat
    )
    output = OutputGuard(ranks, output_dir)
    with output.writing():
        monitor.evaluation(progress.step, "eval", {**result.metrics, "cross_entropy": result.cross_entropy})
    peak = torch.tensor([peak_memory_bytes(ranks.device)], dtype=torch.float64, device=ranks.device)
    peak_bytes = int(ranks.max(peak))
    if ranks.is_main:
        summary = {
            "task": prepared.task.name, "model": run.model, "perturbation": run.chosen.name, "prompt": run.prompt,
            "seed": run.seed, "world_size": ranks.world, "steps": progress.step, "metrics": result.metrics,
            "majority": result.majority, "step_seconds_median": median_or_zero(progress.step_seconds),
            "tokens_per_second": median_or_zero(progress.tokens_per_second), "peak_memory_bytes": peak_bytes,
            "eval_split": run.eval_split, "eval_examples": result.examples, "eval_cross_entropy": result.cross_entropy,
            "best_step": progress.best_step, "select_metrics": progress.best.metrics if progress.best else {},
        }  # fmt: skip
        card = {"task": prepared.task.spec(), "head": asdict(prepared.plan), "result": summary, "versions": versions()}
        prompt, head = engine.backbone.head.split(values)
        with output.writing():
            write_adapter(
                output_dir / "adapter", prompt, str(prepared.folder.resolve()), prepared.config, card, run.prompt,
                prepared.plan, head, prepared.task.places_prompt,
            )  # fmt: skip
            write_json(output_dir / "result.json", summary)
    output.agree()
    return result


def _predict(
    prepared: Prepared, engine: Engine, ranks: Ranks, progress: Progress, output_dir: Path, watchdog: Watchdog
) -> None:
    """predictions/<Task>.jsonl of --predict_split, by the best prompt."""
    task, split, best = prepared.task, prepared.predict_split, progress.best_prompt
    if split is None:
        return
    assert best is not None, "the last step always evaluates"
    scores = score_examples(engine.backbone, best, prepared.predict, ranks, prepared.run.eval_tokens, watchdog.beat)
    file, output = output_dir / "predictions" / f"{task.name}.jsonl", OutputGuard(ranks, output_dir)
    if ranks.is_main:
        with output.writing():
            write_jsonl(file, prediction_lines(task, split, scores.argmax(-1).tolist()))
    output.agree()
    say(ranks, f"predictions for {prepared.run.predict_split}: {file}")


def _announce(prepared: Prepared, ranks: Ranks, result: Evaluation, progress: Progress, output_dir: Path) -> None:
    shown = "  ".join(f"{name} {value:.3f}" for name, value in result.metrics.items())
    say(ranks, f"\n{prepared.task.name} {prepared.run.eval_split} ({result.examples} rows, prompt of step "
               f"{progress.best_step}): {shown}  |  majority class: accuracy {result.majority:.3f}")  # fmt: skip
    say(ranks, f"adapter, result.json and logs: {output_dir}")
    say(ranks, f"scalars: tensorboard --logdir {output_dir}/tensorboard")


def versions() -> dict[str, str | None]:
    """Versions of python, of the packages a result depends on, and of this project's git revision where it has one."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in (*_VERSIONED, "ptp_ds"):
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


def describe_run(prepared: Prepared, ranks: Ranks) -> dict[str, Any]:
    """config.json: settings, the resolved DeepSpeed configuration, the task, data and versions."""
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
    return {
        "run": asdict(prepared.run), "deepspeed": prepared.resolved.config, "auto": prepared.resolved.notes,
        "preset": preset_effect(prepared.run.preset, asdict(prepared.run)),
        "task": prepared.task.spec(), "model_folder": str(prepared.folder), "world_size": ranks.world, "device": device,
        "rows": {"train": len(prepared.train), "select": len(prepared.select), "eval": len(prepared.evaluation)},
        "training_data_sha256": prepared.identity["training data"],
        "perturbation_sha256": prepared.run.chosen.sha256, "versions": versions(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """scripts/train.py: returns the exit code; user errors are one sentence on rank 0."""
    argv = sys.argv[1:] if argv is None else argv
    if "--list_families" in argv:
        print(describe_families())
        return 0
    end_at_once()
    prepare_environment()
    try:
        prepared = prepare(argv, description)
        watchdog = Watchdog(prepared.run.stall_timeout, env_rank())
        try:
            ranks = start_processes()
            require_agreement(ranks, fingerprints(prepared))
            return train_run(prepared, ranks, watchdog)
        finally:
            watchdog.stop()
    except ValueError as error:
        return report_error(error)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        return _report_lost(error)
    finally:
        stop_processes()


def _report_lost(error: Exception) -> int:
    """Prints that another rank is gone, and returns exit code LOST_RANK."""
    cause = str(error).strip().split("\n")[0]
    tell(
        f"error on rank {env_rank()}: another rank is gone, its connection broke ({cause}). The other lines tell the "
        "first cause; what was saved is whole, --resume auto goes on."
    )
    return LOST_RANK


def report_error(error: ValueError) -> int:
    """Prints the sentence once a host, on rank 0 alone where there is one host, and returns exit code 2.

    A launcher ends all ranks as soon as one exits, so a host's other ranks wait for its first one to speak and exit; a
    rank that nothing has ended by then failed alone, and speaks itself.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(30)
    rank = os.environ.get("RANK", "0")
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    tell(f"{prefix}: {error}")
    return USER_ERROR
