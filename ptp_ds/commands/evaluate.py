"""scripts/evaluate.py: a saved adapter's scores on a split, by the same passes that training's evaluation uses."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ptp_ds.adapters.card import untrained_metrics
from ptp_ds.adapters.lm_eval import write_harness_task
from ptp_ds.adapters.origin import adapter_rows, adapter_split, reported_rows, trained_max_length
from ptp_ds.adapters.read import adapter_folder, read_card
from ptp_ds.adapters.served import Served, serve
from ptp_ds.adapters.task import adapter_task, ensemble_task
from ptp_ds.backbone.loading import ResolvedDeepSpeed
from ptp_ds.commands.exits import run_command
from ptp_ds.config.ds_config import for_scoring, read_ds_config, resolve_here
from ptp_ds.config.parsers import evaluate_parser
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import require_writable, require_writable_folder, write_json, write_jsonl
from ptp_ds.precision import PRECISION_OF
from ptp_ds.ranks.distributed import Ranks, env_rank, env_world, prepare_environment, start_processes
from ptp_ds.ranks.faults import OutputGuard
from ptp_ds.ranks.log import get_logger
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split, is_labelled
from ptp_ds.tasks.predictions import check_numbers, prediction_lines
from ptp_ds.training.evaluate import evaluation_of, majority_metrics

log = get_logger(__name__)
_RUN = (
    "perturbation",
    "prompt",
    "seed",
    "settings",
    "training_data_sha256",
)  # of its result.json, what tells tables apart


def _evaluate(args: argparse.Namespace) -> None:
    if args.eval_tokens < 1:
        raise UserError(f"--eval_tokens is {args.eval_tokens}; expected a whole number of 1 or more.")
    for flag, file in (("--json", args.json), ("--predictions", args.predictions)):
        if file is not None and env_rank() == 0:  # other hosts need not have that folder
            require_writable(flag, file)
    if args.lm_eval_tasks is not None and env_rank() == 0:
        require_writable_folder("--lm_eval_tasks", args.lm_eval_tasks)
    folders = [adapter_folder(given) for given in args.adapter]
    task = ensemble_task(folders, args.task)
    split_name = args.split or adapter_split(folders[0], task)
    split = adapter_rows(folders[0], task, split_name, args.data_dir, args.dataset)
    labelled = args.predictions is None or is_labelled(task, split)
    raw = read_ds_config(args.ds_config)
    served = serve(folders, model=args.model, task=task, max_length=args.max_length)
    examples = served.examples(split, labelled)
    if args.predictions is not None:
        check_numbers(served.task, split, len(examples))
    if args.lm_eval_tasks is not None and env_rank() == 0:
        command = write_harness_task(Path(args.lm_eval_tasks), served, split)
        log.info("lm-eval gives these scores by: %s", command)
    untrained = _untrained(args, served, split) if labelled else {}
    resolved = _resolved(raw, args, served)
    ranks = start_processes()
    scores = served.score(served.load(resolved, ranks, examples), examples, ranks, args.eval_tokens)
    result = evaluation_of(scores, examples, served.task) if labelled else None
    shown = f"{task.name} {split_name} ({len(examples)} rows): "
    if result is not None:
        shown += "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        if untrained:
            shown += "  |  untrained " + "  ".join(f"{name} {value:.4f}" for name, value in untrained.items())
        majority = majority_metrics(examples, served.task)
        shown += "  |  majority class " + "  ".join(f"{name} {value:.4f}" for name, value in majority.items())
    log.info("%s", shown if result is not None else f"{shown}no labels, so no metrics")
    record = {**_of_run(args, served, split_name, resolved), **(result.as_dict() if result is not None else {})}
    record |= {"untrained": untrained} if untrained else {}
    _write(args, ranks, record | {"split": split_name}, split, served.task, scores)


def _resolved(raw: dict[str, Any], args: argparse.Namespace, served: Served) -> ResolvedDeepSpeed:
    run = RunConfig(model=served.model, prompt_length=served.prompt_length, precision=args.precision,
                    ds_config=args.ds_config, nvme_path=args.nvme_path, batch_size=env_world())  # fmt: skip
    return resolve_here(for_scoring(raw), run, (), served.source)


def _write(
    args: argparse.Namespace, ranks: Ranks, record: dict[str, Any], split: Split, task: Task, scores: torch.Tensor
) -> None:
    output = OutputGuard(ranks, Path(args.json or args.predictions or "."), resumes=False)
    with output.writing():
        if args.json and ranks.is_main:
            rows = [[value for value in row if value > float("-inf")] for row in scores.tolist()]
            write_json(Path(args.json), {**record, "scores": rows})
        if args.predictions and ranks.is_main:
            write_jsonl(Path(args.predictions), prediction_lines(task, split, scores.argmax(-1).tolist()))
            log.info("predictions: %s", args.predictions)
    output.agree()


def _untrained(args: argparse.Namespace, served: Served, split: Split) -> dict[str, float]:
    """Metrics of the prompt that the run began with, where it scored these very rows, by their digest, read alike; {}
    for an ensemble, and where an older run doesn't say which rows it scored.
    """
    if len(served.folders) != 1 or reported_rows(served.folders[0]) != split.digest:
        return {}
    (folder,) = served.folders
    card = read_card(folder)
    trained = card.get("result") or {}
    if not card.get("task"):
        return {}
    if args.max_length not in (None, trained_max_length(folder)) or adapter_task(folder, None) != served.task:
        return {}
    return untrained_metrics(trained)


def _of_run(args: argparse.Namespace, served: Served, split: str, resolved: ResolvedDeepSpeed) -> dict[str, Any]:
    """What result.json says of the run that trained the adapter: with the metrics, scripts/overall.py reads this."""
    trained = read_card(served.folders[0]).get("result") or {} if len(served.folders) == 1 else {}
    run = {name: trained[name] for name in _RUN if name in trained}
    if isinstance(run.get("settings"), dict):
        run["settings"] = {**run["settings"], **_scored_with(args, run["settings"], resolved)}
    model = args.model or trained.get("model") or served.model
    return {"task": served.task.name, "model": model, "eval_split": split, "template": served.task.spec(), **run}


def _scored_with(args: argparse.Namespace, settings: Mapping[str, Any], resolved: ResolvedDeepSpeed) -> dict[str, Any]:
    """The settings of the run in whose place the scores were made with others: those."""
    given = {name: getattr(args, name) for name in ("task", "max_length") if getattr(args, name) is not None}
    precision = PRECISION_OF[resolved.dtype]
    if settings.get("precision", RunConfig.precision) not in (args.precision, precision):
        given["precision"] = precision
    return given


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence on rank 0."""
    prepare_environment()
    argv = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _evaluate(evaluate_parser(description).parse_args(argv)))
