"""scripts/predict.py: a saved adapter's answers to rows of one's own, with their probabilities, or generated text."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ptp_ds.adapters.generate import generate, stop_tokens
from ptp_ds.adapters.read import adapter_kind, read_adapter, read_head
from ptp_ds.adapters.task import adapter_plan, adapter_task
from ptp_ds.backbone.check import checked_backbone
from ptp_ds.backbone.heads import HeadPlan, auto_class, rows_for
from ptp_ds.backbone.loading import load_backbone
from ptp_ds.backbone.positions import row_room
from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.backbone.source import load_config, load_tokenizer, resolve_model
from ptp_ds.commands.exits import run_command
from ptp_ds.config.flags import StrictParser
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import require_writable, write_jsonl
from ptp_ds.packing.layouts import Rows
from ptp_ds.precision import PRECISIONS, dtype_of
from ptp_ds.prompts import prompt_width
from ptp_ds.ranks.distributed import Ranks, env_world, prepare_environment
from ptp_ds.ranks.log import get_logger
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split, load_rows, tokenise
from ptp_ds.tasks.example import Example
from ptp_ds.training.evaluate import score_examples

log = get_logger(__name__)
_OF_FIELDS = ("flat", "pairs")  # readers whose rows are fields of text and nothing else
_OF_SEVERAL = ("multirc", "record")  # readers whose rows hold several questions


@dataclass(frozen=True)
class Served:
    """An adapter on its model. kind, prompt: soft [P, H] or deep [P, D]. room: tokens of a row that fit behind it.

    task: the one to answer, its classes in the order that a trained classifier knows.
    """

    adapter: str
    task: Task
    plan: HeadPlan
    rows: Rows
    folder: Path
    tokenizer: Any
    kind: str
    prompt: Tensor
    room: int
    dtype: torch.dtype
    device: torch.device


def _parse(argv: Sequence[str], description: str) -> argparse.Namespace:
    defaults = RunConfig()
    parser = StrictParser(description=description, allow_abbrev=False)
    parser.add_argument("--adapter", required=True, help="folder with adapter_config.json, ours or peft's")
    parser.add_argument("--model", default=defaults.model, help="hub id, folder or the embedded model")
    parser.add_argument("--task", help="task name or template .json; default: the one the adapter was trained on")
    parser.add_argument("--input", help="jsonl file with the fields that the task's template needs; no labels")
    parser.add_argument("--output", help="write a JSON object a context here; default: standard output")
    parser.add_argument("--text", nargs="+", metavar="FIELD=VALUE", help="one row instead of --input; the text alone "
                        "where the template has a single field")  # fmt: skip
    parser.add_argument(
        "--generate", type=int, metavar="N", help="also generate N tokens behind each context, greedily"
    )
    parser.add_argument("--precision", default="auto", choices=PRECISIONS)
    parser.add_argument("--max_length", type=int, help="longest row in tokens, prompt included")
    parser.add_argument("--eval_tokens", type=int, default=defaults.eval_tokens, help="tokens of a pass")
    args = parser.parse_args(argv)
    if (args.input is None) == (args.text is None):
        raise UserError("Give either --input or --text, one of the two.")
    if args.output is not None and args.text is not None:
        raise UserError("--output goes with --input; the answer to --text is printed.")
    for name in ("generate", "eval_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected a whole number of 1 or more.")
    if args.output is not None:
        require_writable("--output", args.output)
    if env_world() > 1:
        raise UserError("scripts/predict.py is one process; start it with plain python, not with a launcher.")
    return args


def row_of_text(task: Task, words: Sequence[str]) -> dict[str, str]:
    """--text's words as a row: field=value each, or one text for the only field. ValueError for anything else."""
    if task.reader not in _OF_FIELDS:
        raise UserError(f"--text can't hold a row of task {task.name}, which is more than fields; give --input.")
    fields = task.fields
    if len(fields) == len(words) == 1 and not words[0].startswith(f"{fields[0]}="):
        return {fields[0]: words[0]}
    row: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in fields or name in row:
            raise UserError(f"--text {word!r}: expected field=value, once for each field of {', '.join(fields)}.")
        row[name] = value
    return row


def answer_lines(task: Task, split: Split, scores_NC: Tensor) -> list[dict[str, Any]]:
    """A line a context: its row (from 0) and idx, the likeliest answer, every answer's probability.

    scores_NC: candidate log-probabilities in tokenise's order. Answers are the template's labels, or the row's own
    names; their probabilities are a softmax over the row's answers. entry counts the contexts of a row with several.
    """
    lines: list[dict[str, Any]] = []
    scores = iter(scores_NC)
    for number, (row, where) in enumerate(zip(split.rows, split.where, strict=True)):
        for place, entry in enumerate(task.entries(row, where, labelled=False)):
            names = entry.names or task.labels
            shares = next(scores)[: len(names)].softmax(-1)
            line: dict[str, Any] = {"row": number, **({"idx": row["idx"]} if "idx" in row else {})}
            line |= {"entry": place} if task.reader in _OF_SEVERAL else {}
            line |= {"answer": names[int(shares.argmax())]}
            line |= {"probabilities": dict(zip(names, shares.tolist(), strict=True))}
            lines.append(line)
    return lines


def _serve(args: argparse.Namespace, task: Task) -> Served:
    kind, folder = adapter_kind(args.adapter), resolve_model(args.model)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    plan, task = adapter_plan(args.adapter, config, task)
    auto_class(config, plan.kind, folder)
    if args.generate is not None and plan.kind != "causal":
        raise UserError(f"--generate needs a causal model; {args.model} serves this adapter with a {plan.kind} head.")
    prompt = read_adapter(args.adapter, prompt_width(kind, config))
    rows = rows_for(plan, task, tokenizer, kind, prompt.shape[0])
    room = row_room(args.max_length, prompt.shape[0], config, plan) - rows.extra_tokens
    if args.generate is not None and args.generate >= room:
        raise UserError(f"--generate {args.generate} leaves no room for a row: {room} tokens fit behind the prompt.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype_of(args.precision)
    return Served(args.adapter, task, plan, rows, folder, tokenizer, kind, prompt, room, dtype, device)


def _examples(served: Served, split: Split, left: int = 0) -> Sequence[Example]:
    """The rows' examples, with room for `left` tokens behind each; says how many had to be shortened for that."""
    task = served.task
    tokenised = tokenise(task, split, served.tokenizer, served.room - left, labelled=False)
    if tokenised.truncated:
        behind = f" and {left} tokens behind it" if left else ""
        log.warning(
            "%d rows were longer than the context%s: shortened in %r", tokenised.truncated, behind, task.truncate
        )
    return tokenised.examples


def _score(served: Served, examples: Sequence[Example], budget: int) -> Tensor:
    """[N, C] the log-probabilities that scripts/evaluate.py computes."""
    ranks = Ranks(0, 1, 0, served.device)
    whole = ResolvedDeepSpeed({"zero_optimization": {"stage": 2}}, [], served.dtype)
    backbone, _ = checked_backbone(load_backbone(served.folder, whole, ranks, served.plan))
    backbone.serve(served.kind, served.rows, served.prompt.shape[0])
    trained = backbone.head.join(served.prompt, read_head(served.adapter, backbone.head.trained))
    return score_examples(backbone, trained, examples, ranks, budget)


def _generate(served: Served, examples: Sequence[Example], count: int) -> list[str]:
    """Each context's continuation. The model is loaded anew: a Backbone's is bound to packed rows."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        served.folder, dtype=served.dtype, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
    )
    model = model.to(served.device).eval()
    stops = stop_tokens(model, served.tokenizer)
    found = [generate(model, served.prompt, served.kind, e.context_ids, count, stops) for e in examples]
    return [served.tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def _show(task: Task, row: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    """--text's answer: the likeliest first, each with its label, probability and text."""
    (entry,) = task.entries(row, "--text", labelled=False)
    ranked = sorted(zip(line["probabilities"].items(), entry.candidates, strict=True), key=lambda found: -found[0][1])
    width = max(map(len, line["probabilities"]))
    for (name, share), text in ranked:
        print(f"{name:{width}}  {share:.4f}  {text!r}")
    if "generated" in line:
        print(f"generated: {line['generated']}")


def _predict(args: argparse.Namespace) -> None:
    task = adapter_task(args.adapter, args.task)
    split = load_rows(args.input) if args.text is None else Split([row_of_text(task, args.text)], ["--text"], "")
    served = _serve(args, task)
    examples = _examples(served, split)
    contexts = [] if args.generate is None else _examples(served, split, args.generate)
    lines = answer_lines(served.task, split, _score(served, examples, args.eval_tokens))
    if args.generate is not None:
        texts = _generate(served, contexts, args.generate)
        lines = [{**line, "generated": text} for line, text in zip(lines, texts, strict=True)]
    if args.output is not None:
        write_jsonl(Path(args.output), lines)
    elif args.text is not None:
        _show(served.task, split.rows[0], lines[0])
    else:
        print("\n".join(map(json.dumps, lines)))


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Returns the exit code; user errors are one sentence."""
    prepare_environment()
    return run_command(lambda: _predict(_parse(sys.argv[1:] if argv is None else argv, description)))
