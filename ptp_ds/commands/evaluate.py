"""scripts/evaluate.py: a saved adapter's scores on a split, by the same passes that training's evaluation uses."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ptp_ds.adapters.read import adapter_kind, read_adapter, read_card, read_head
from ptp_ds.adapters.task import adapter_task, ensemble_plan
from ptp_ds.backbone.check import checked_backbone
from ptp_ds.backbone.heads import auto_class, rows_for
from ptp_ds.backbone.loading import load_backbone
from ptp_ds.backbone.positions import row_room
from ptp_ds.backbone.source import load_config, load_tokenizer, resolve_model
from ptp_ds.commands.exits import run_command
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.flags import StrictParser
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import nearest, require_writable, write_json, write_jsonl
from ptp_ds.precision import PRECISIONS
from ptp_ds.prompts import prompt_width
from ptp_ds.ranks.distributed import Ranks, env_world, prepare_environment, start_processes
from ptp_ds.ranks.log import get_logger
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split, is_labelled, load_split, tokenise
from ptp_ds.tasks.predictions import check_numbers, prediction_lines
from ptp_ds.training.evaluate import ensemble_scores, evaluation_of, score_examples

log = get_logger(__name__)


def _parse(argv: Sequence[str], description: str) -> argparse.Namespace:
    defaults = RunConfig()
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, nargs="+", help="folder with adapter_config.json, ours or peft's; "
                        "several of one task are an ensemble: the mean of their probabilities")  # fmt: skip
    parser.add_argument("--model", default=defaults.model, help="hub id, folder or the embedded model")
    parser.add_argument("--task", help="task name or template .json; default: the one the adapter was trained on")
    parser.add_argument("--data_dir", help="folder with <Task>/<split>.jsonl; default: the packaged demo data")
    parser.add_argument("--dataset", help="hub dataset id or folder, instead of --data_dir")
    parser.add_argument("--split", default=defaults.eval_split)
    parser.add_argument("--ds_config", default=defaults.ds_config)
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--eval_tokens", type=int, default=defaults.eval_tokens)
    parser.add_argument("--json", help="write metrics and every row's candidate log-probabilities to this file")
    parser.add_argument("--predictions", help="write SuperGLUE's prediction file here; the split may have no labels")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    values, rest = parser.parse_known_args(argv)
    if rest:
        known = [word for action in parser._actions for word in action.option_strings]
        raise UserError(f"Unknown argument {rest[0]!r}{nearest(rest[0].split('=')[0], known)}. See --help.")
    return values


def _evaluate(args: argparse.Namespace) -> None:
    if args.eval_tokens < 1:
        raise UserError(f"--eval_tokens is {args.eval_tokens}; expected a whole number of 1 or more.")
    for flag, file in (("--json", args.json), ("--predictions", args.predictions)):
        if file is not None:
            require_writable(flag, file)
    task = adapter_task(args.adapter[0], args.task)
    split = load_split(task, args.split, args.data_dir, args.dataset)
    labelled = args.predictions is None or is_labelled(task, split)
    raw = read_ds_config(args.ds_config)
    kind = adapter_kind(args.adapter[0])
    folder = resolve_model(args.model)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    plan, task = ensemble_plan(args.adapter, config, task)
    auto_class(config, plan.kind, folder)
    prompts = [read_adapter(args.adapter[0], prompt_width(kind, config))]
    length = prompts[0].shape[0]
    prompts += [read_adapter(adapter, prompts[0].shape[1], length, kind) for adapter in args.adapter[1:]]
    run = RunConfig(model=args.model, prompt_length=length, precision=args.precision,
                    ds_config=args.ds_config, batch_size=env_world())  # fmt: skip
    resolved = resolve_ds_config(raw, run, set(), env_world(), config.get_text_config().hidden_size)
    rows = rows_for(plan, task, tokenizer, kind, length)
    room = row_room(args.max_length, length, config, plan) - rows.extra_tokens
    tokenised = tokenise(task, split, tokenizer, room, labelled)
    if args.predictions is not None:
        check_numbers(task, split, len(tokenised.examples))
    ranks = start_processes()
    backbone = load_backbone(folder, resolved, ranks, plan)
    backbone, _ = checked_backbone(backbone)
    backbone.serve(kind, rows, length)
    head = backbone.head
    scores = ensemble_scores([
        score_examples(backbone, head.join(prompt, read_head(adapter, head.trained)), tokenised.examples, ranks,
                       args.eval_tokens)
        for adapter, prompt in zip(args.adapter, prompts, strict=True)
    ])  # fmt: skip
    result = evaluation_of(scores, tokenised.examples, task) if labelled else None
    shown = f"{task.name} {args.split} ({len(tokenised.examples)} rows): "
    if result is not None:
        shown += "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        shown += f"  |  majority {result.majority:.4f}"
    log.info("%s", shown if result is not None else f"{shown}no labels, so no metrics")
    _write(args, ranks, task, split, result.as_dict() if result is not None else {}, scores)


def _write(
    args: argparse.Namespace, ranks: Ranks, task: Task, split: Split, result: dict[str, Any], scores: torch.Tensor
) -> None:
    if args.json and ranks.is_main:
        rows = [[value for value in row if value > float("-inf")] for row in scores.tolist()]
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(args.json), {**_of_run(args, task), **result, "split": args.split, "scores": rows})
    if args.predictions and ranks.is_main:
        write_jsonl(Path(args.predictions), prediction_lines(task, split, scores.argmax(-1).tolist()))
        log.info("predictions: %s", args.predictions)
    ranks.barrier()


def _of_run(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """What result.json says of the run that trained the adapter: with the metrics, scripts/overall.py reads this."""
    trained = read_card(args.adapter[0]).get("result") if len(args.adapter) == 1 else None
    kept = trained if isinstance(trained, dict) else {}
    run = {name: kept[name] for name in ("perturbation", "prompt", "seed") if name in kept}
    return {"task": task.name, "model": args.model, "eval_split": args.split, **run}


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence on rank 0."""
    prepare_environment()
    return run_command(lambda: _evaluate(_parse(sys.argv[1:] if argv is None else argv, description)))
