"""scripts/evaluate.py: a saved adapter's scores on a split, by the same passes that training's evaluation uses."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ptp_ds.check import checked
from ptp_ds.checkpoint import write_json
from ptp_ds.config import RunConfig, StrictParser, nearest
from ptp_ds.data import load_split, tokenise
from ptp_ds.distributed import Ranks, env_world, prepare_environment, start_processes, stop_processes
from ptp_ds.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.evaluate import evaluation_of, score_examples
from ptp_ds.export import adapter_kind, read_adapter, read_card, read_head
from ptp_ds.heads import HeadPlan, auto_class, plan_head
from ptp_ds.loading import load_backbone, load_config, load_tokenizer
from ptp_ds.models import resolve_model
from ptp_ds.monitor import say
from ptp_ds.prompts import prompt_width
from ptp_ds.rows import rows_for
from ptp_ds.run import report_error, row_room
from ptp_ds.tasks import Task, load_task
from ptp_ds.tasks.template import parse_task


def _parse(argv: Sequence[str], description: str) -> argparse.Namespace:
    defaults = RunConfig()
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="folder with adapter_config.json, ours or peft's")
    parser.add_argument("--model", default=defaults.model, help="hub id, folder or the embedded model")
    parser.add_argument("--task", help="task name or template .json; default: the one the adapter was trained on")
    parser.add_argument("--data_dir", help="folder with <Task>/<split>.jsonl; default: the packaged demo data")
    parser.add_argument("--dataset", help="hub dataset id or folder, instead of --data_dir")
    parser.add_argument("--split", default=defaults.eval_split)
    parser.add_argument("--ds_config", default=defaults.ds_config)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--eval_tokens", type=int, default=defaults.eval_tokens)
    parser.add_argument("--json", help="write metrics and every row's candidate log-probabilities to this file")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    values, rest = parser.parse_known_args(argv)
    if rest:
        known = [word for action in parser._actions for word in action.option_strings]
        raise ValueError(f"Unknown argument {rest[0]!r}{nearest(rest[0].split('=')[0], known)}. See --help.")
    return values


def _task_of(args: argparse.Namespace) -> Task:
    if args.task is not None:
        return load_task(args.task)
    spec = read_card(args.adapter).get("task")
    if not isinstance(spec, dict):
        raise ValueError(f"Adapter {args.adapter} doesn't say which task it was trained on; give --task.")
    kept = {key: value for key, value in spec.items() if key != "answers" and value is not None}
    if spec.get("answers"):
        kept["candidates"] = spec["answers"]
    return parse_task(kept, f"the card of {args.adapter}")


def _plan(args: argparse.Namespace, config: Any, task: Task) -> tuple[HeadPlan, Task]:
    """The head that the adapter was trained with, and the task with its classes in the trained order."""
    card = read_card(args.adapter)
    plan = plan_head(config, card.get("head", {}).get("kind", "auto"), task)
    trained = list((card.get("task") or {}).get("answers") or task.answers)
    if plan.kind != "classes" or plan.choice or trained == list(task.answers):
        return plan, task
    if set(trained) != set(task.answers):
        raise ValueError(
            f"The classifier of {args.adapter} tells {', '.join(trained)} apart; task {task.name} has "
            f"{', '.join(task.answers)}."
        )
    return plan, replace(task, answers={label: task.answers[label] for label in trained})


def _evaluate(args: argparse.Namespace) -> None:
    if args.eval_tokens < 1:
        raise ValueError(f"--eval_tokens is {args.eval_tokens}; expected a whole number of 1 or more.")
    task = _task_of(args)
    split = load_split(task, args.split, args.data_dir, args.dataset)
    raw = read_ds_config(args.ds_config)
    kind = adapter_kind(args.adapter)
    folder = resolve_model(args.model)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    plan, task = _plan(args, config, task)
    auto_class(config, plan.kind, folder)
    prompt = read_adapter(args.adapter, prompt_width(kind, config))
    run = RunConfig(model=args.model, prompt_length=prompt.shape[0], precision=args.precision,
                    ds_config=args.ds_config, batch_size=env_world())  # fmt: skip
    resolved = resolve_ds_config(raw, run, set(), env_world(), config.get_text_config().hidden_size)
    rows = rows_for(plan, tokenizer, kind, prompt.shape[0])
    room = row_room(args.max_length, prompt.shape[0], config, plan) - rows.behind
    tokenised = tokenise(task, split, tokenizer, room)
    ranks = start_processes()
    backbone = load_backbone(folder, resolved, ranks, plan)
    backbone, _ = checked(backbone)
    backbone.serve(kind, rows, prompt.shape[0])
    values = backbone.head.join(prompt, read_head(args.adapter, backbone.head.trained))
    scores = score_examples(backbone, values, tokenised.examples, ranks, args.eval_tokens)
    result = evaluation_of(scores, tokenised.examples, task)
    shown = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    say(ranks, f"{task.name} {args.split} ({result.examples} rows): {shown}  |  majority {result.majority:.4f}")
    _write(args, ranks, result.as_dict(), scores)


def _write(args: argparse.Namespace, ranks: Ranks, result: dict[str, Any], scores: torch.Tensor) -> None:
    if args.json and ranks.is_main:
        rows = [[value for value in row if value > float("-inf")] for row in scores.tolist()]
        write_json(Path(args.json), {**result, "split": args.split, "scores": rows})
    ranks.barrier()


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence on rank 0."""
    prepare_environment()
    try:
        _evaluate(_parse(sys.argv[1:] if argv is None else argv, description))
        return 0
    except ValueError as error:
        return report_error(error)
    finally:
        stop_processes()
