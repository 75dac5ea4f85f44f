"""scripts/predict.py: a saved adapter's answers to rows of one's own, with their probabilities, or generated text."""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptp_ds.adapters.answers import answer_lines
from ptp_ds.adapters.generate import generate, stop_tokens
from ptp_ds.adapters.read import adapter_folder
from ptp_ds.adapters.served import Served, alone, serve, whole
from ptp_ds.adapters.task import adapter_task
from ptp_ds.commands.exits import run_command
from ptp_ds.config.parsers import predict_parser
from ptp_ds.errors import UserError
from ptp_ds.files import nearest, require_writable, write_jsonl
from ptp_ds.ranks.distributed import env_world, prepare_environment
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split, load_rows
from ptp_ds.tasks.example import Example

_NAMED = re.compile(r"([^\W\d]\w*)=(?!=)")  # NAME=value, as for a field; not "2+2=4", "a = b" or "a==b"


def _parse(argv: Sequence[str], description: str) -> argparse.Namespace:
    args = predict_parser(description).parse_args(argv)
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
        if Path(args.output).suffix.lower() in (".csv", ".tsv"):
            raise UserError(
                f"--output {args.output}: answers are JSON lines, no table; give a name in .jsonl, such as "
                f"{Path(args.output).with_suffix('.jsonl')}."
            )
    if env_world() > 1:
        raise UserError("scripts/predict.py is one process; start it with plain python, not with a launcher.")
    return args


def row_of_text(task: Task, words: Sequence[str]) -> dict[str, str]:
    """--text's words as a row: field=value each, or one text for the only field.

    ValueError for anything else, and for a text that begins as a field's value would, with a name that is no field's.
    """
    if not task.of_fields:
        raise UserError(f"--text can't hold a row of task {task.name}, which is more than fields; give --input.")
    fields = task.fields
    if len(fields) == len(words) == 1 and not words[0].startswith(f"{fields[0]}="):
        if named := _NAMED.match(words[0]):
            raise UserError(
                f"--text {words[0]!r}: task {task.name} has no field {named[1]!r}{nearest(named[1], fields)}; its only "
                f"one is {fields[0]}, so write {fields[0]}=... with the text behind it."
            )
        return {fields[0]: words[0]}
    row: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in fields or name in row:
            raise UserError(f"--text {word!r}: expected field=value, once for each field of {', '.join(fields)}.")
        row[name] = value
    return row


def _generate(served: Served, precision: str, examples: Sequence[Example], count: int) -> list[str]:
    """Each context's continuation."""
    tokenizer, (prompt,) = served.source.tokenizer, served.prompts
    model = served.plain(precision, "eager")
    stops = stop_tokens(model, tokenizer)
    found = [generate(model, prompt, served.kind, e.context_ids, count, stops, e.prompt_at) for e in examples]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]


def _show(task: Task, row: Mapping[str, Any], line: Mapping[str, Any]) -> None:
    """--text's answer: the likeliest first, each with its label, probability and text."""
    (entry,) = task.entries(row, "--text", labelled=False)
    ranked = sorted(zip(line["probabilities"].items(), entry.candidates, strict=True), key=lambda found: -found[0][1])
    width = max(map(len, line["probabilities"]))
    for (name, share), text in ranked:
        print(f"{name:{width}}  {share:.4f}  {text!r}")
    if "generated" in line:
        print(f"generated: {line['generated']}")


def _require_generates(served: Served, count: int) -> None:
    """ValueError where the model doesn't continue texts, or `count` tokens leave no room for one."""
    kind = served.source.head_plan.kind
    if kind != "causal":
        raise UserError(f"--generate needs a causal model; {served.model} serves this adapter with a {kind} head.")
    if count >= served.room:
        raise UserError(f"--generate {count} leaves no room for a row: {served.room} tokens fit behind the prompt.")


def _predict(args: argparse.Namespace) -> None:
    folder = adapter_folder(args.adapter)
    task = adapter_task(folder, args.task)
    split = load_rows(args.input) if args.text is None else Split([row_of_text(task, args.text)], ["--text"], "")
    served = serve([folder], model=args.model, task=task, max_length=args.max_length)
    if args.generate is not None:
        _require_generates(served, args.generate)
    examples, ranks = served.examples(split), alone()
    contexts = [] if args.generate is None else served.examples(split, left=args.generate)
    scores_NC = served.score(served.load(whole(args.precision), ranks, examples), examples, ranks, args.eval_tokens)
    lines = answer_lines(served.task, split, scores_NC)
    if args.generate is not None:
        texts = _generate(served, args.precision, contexts, args.generate)
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
