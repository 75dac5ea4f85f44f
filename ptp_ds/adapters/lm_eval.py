"""A task of ours as one of lm-evaluation-harness, which then scores the adapter through peft: the same rows, texts,
answers and accuracy. What that harness would compute otherwise is refused.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptp_ds.adapters.served import Served
from ptp_ds.errors import UserError
from ptp_ds.files import is_folder, listed, require_writable_folder, write_jsonl, write_text
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.ranks.log import get_logger
from ptp_ds.tasks import Task
from ptp_ds.tasks.data import Split, tail_ids, tokenise
from ptp_ds.tasks.template import SLOT

Renderer = Callable[[Mapping[str, Any]], tuple[str, list[str], int]]
log = get_logger(__name__)
_GOLD = "gold"  # the rows' field with the right answer's number
_METRICS = {"accuracy": "acc", "matthews": "mcc"}  # ours and theirs that are the same
_AGGREGATION = {"acc": "mean", "mcc": "matthews_corrcoef"}


@dataclass(frozen=True)
class HarnessTask:
    """config: the harness' YAML, plain data. rows: what its file of rows holds."""

    config: dict[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.config["task"]


def write_harness_task(folder: Path, served: Served, split: Split) -> str:
    """<folder>/<task>.yaml and <task>.jsonl, its rows; returns the harness' command line.

    Raises UserError where the harness' scores would not be ours: see harness_task and _special_tokens.
    """
    require_writable_folder("--lm_eval_tasks", str(folder))
    if len(served.folders) > 1:
        raise UserError("--lm_eval_tasks is for one adapter: lm-eval knows no ensembles.")
    if (kind := served.source.head_plan.kind) != "causal":
        raise UserError(f"--lm_eval_tasks needs a causal model; this adapter's answers come from a {kind} head.")
    folder = folder.absolute()
    made = harness_task(served.task, split, folder)
    special = _special_tokens(served, split)
    write_jsonl(folder / f"{made.name}.jsonl", made.rows)
    text = yaml.safe_dump(made.config, sort_keys=False, allow_unicode=True, width=110)
    write_text(folder / f"{made.name}.yaml", text)
    local = served.model == EMBEDDED_MODEL or is_folder(served.model)
    model = served.source.folder.absolute() if local else served.model
    arguments = f"pretrained={model},peft={served.folders[0].absolute()},dtype=float32"
    arguments += "" if special is None else f",add_bos_token={special}"
    return f"lm_eval --model hf --model_args {arguments} --tasks {made.name} --include_path {folder}"


def harness_task(task: Task, split: Split, folder: Path) -> HarnessTask:
    """The task with a split's rows, which will lie in `folder`.

    Its texts are Jinja templates; each row's are rendered here as the harness renders them and held against ours.
    Raises UserError for tasks whose rows are more than fields, that place the prompt, whose metrics the harness hasn't,
    and for rows whose texts come out otherwise.
    """
    why = f"Task {task.name} can't be one of lm-eval's"
    if not task.of_fields:
        raise UserError(f"{why}: its rows, of the reader {task.reader!r}, hold several questions or their own answers.")
    if task.places_prompt:
        raise UserError(f"{why}: its text says where the prompt stands, and peft puts it in front of everything.")
    metrics = [_METRICS[name] for name in task.metrics if name in _METRICS]
    if not metrics:
        raise UserError(f"{why}: of its metrics ({', '.join(task.metrics)}) lm-eval has none for choices of this kind.")
    name = "ptp_" + re.sub(r"\W+", "_", task.name.lower())
    gold = _GOLD if _GOLD not in task.fields else f"{_GOLD}_answer"
    config = {
        "task": name, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": jinja_of(task.text, task), "doc_to_choice": _choices(task),
        "doc_to_target": f"{{{{{gold}}}}}", "target_delimiter": "", "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": _AGGREGATION[metric], "higher_is_better": True} for metric in metrics
        ],
        "metadata": {"version": 1.0},
    }  # fmt: skip
    rows, render = [], renderer(config)
    for row, where in zip(split.rows, split.where, strict=True):
        (entry,) = task.entries(row, where)
        rows.append({**{field: row[field] for field in task.fields}, gold: entry.gold})
        if entry.context != entry.context.rstrip():
            raise UserError(f"{where}: the text ends in a space or a new line, which lm-eval moves into the answers.")
        if not _same(render, rows[-1], (entry.context, list(entry.candidates), entry.gold)):
            raise UserError(f"{where}: lm-eval's template gives another text than task {task.name}'s own.")
    if left_out := [name for name in task.metrics if name not in _METRICS]:
        log.warning("warning: lm-eval has no %s for choices; it will report %s", listed(left_out), listed(metrics))
    return HarnessTask(config, rows)


def _same(render: Renderer, row: Mapping[str, Any], ours: tuple[str, list[str], int]) -> bool:
    import jinja2

    try:
        return render(row) == ours
    except (jinja2.TemplateError, ValueError, SyntaxError, TypeError):  # a field whose name Jinja reads otherwise
        return False


def renderer(config: Mapping[str, Any]) -> Renderer:
    """What gives a row's (context, answers, number of the right one) as the harness makes them of its YAML."""
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    choices = config["doc_to_choice"]
    try:
        text, target = (environment.from_string(config[name]) for name in ("doc_to_text", "doc_to_target"))
        answers = environment.from_string(choices) if isinstance(choices, str) else None
    except jinja2.TemplateError as error:
        raise UserError(f"lm-eval's templates can't hold this task's fields ({error}).") from None

    def render(row: Mapping[str, Any]) -> tuple[str, list[str], int]:
        own = list(choices) if answers is None else ast.literal_eval(answers.render(**row))
        return text.render(**row), own, int(target.render(**row))

    return render


def jinja_of(text: str, task: Task) -> str:
    """A template's text as Jinja: each {field|filter} as an expression that gives what Task.render puts there."""
    return SLOT.sub(lambda slot: f"{{{{ {_expression(slot[1], slot[2], task)} }}}}", text)


def _expression(name: str, filter_name: str | None, task: Task) -> str:
    value = f"{name}.strip()"
    if name in task.values:
        value = f"{json.dumps(dict(task.values[name]), ensure_ascii=False)}[{value}]"
    if filter_name == "strip_stop":
        return f"{value}.rstrip().rstrip('.')"
    if filter_name == "lower_first":
        return f"{value}[:1].lower() ~ {value}[1:]"
    return value


def _choices(task: Task) -> list[str] | str:
    """The answers: the same for all rows, or a template that renders a list of each row's own."""
    if not task.choice:
        return list(task.answers.values())
    parts = []
    for answer in task.answers.values():
        pieces, end = [], 0
        for slot in SLOT.finditer(answer):
            if slot.start() > end:
                pieces.append(json.dumps(answer[end : slot.start()], ensure_ascii=False))
            pieces.append(f"({_expression(slot[1], slot[2], task)})")
            end = slot.end()
        if end < len(answer):
            pieces.append(json.dumps(answer[end:], ensure_ascii=False))
        parts.append(" ~ ".join(pieces))
    return f"{{{{ [{', '.join(parts)}] }}}}"


def _special_tokens(served: Served, split: Split) -> bool | None:
    """Whether the harness has to put the tokenizer's special tokens around a text; None where it has none.

    UserError where it would see other tokens: rows that we shorten, answers that we end, special tokens that it puts
    elsewhere. That a text's tokens don't change where the answer begins is tokenise's own rule.
    """
    tokenizer = served.source.tokenizer
    tokenised = tokenise(served.task, split, tokenizer, served.room)
    if tokenised.truncated:
        raise UserError(
            "--lm_eval_tasks: some rows are longer than the context; ptp_ds shortens them within a field, lm-eval cuts "
            "their start, so the scores would differ."
        )
    if tokenised.ended:
        raise UserError(
            "--lm_eval_tasks: some rows' answers are ended by the end-of-text token, since one begins with another; "
            "lm-eval scores them without, so the scores would differ."
        )
    with_special = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    behind = tail_ids(tokenizer)
    leading = with_special[: len(with_special) - len(behind) - len(plain)]
    if leading and (behind or leading != [tokenizer.bos_token_id]):
        raise UserError(
            "--lm_eval_tasks: the tokenizer puts special tokens around a text that lm-eval would put elsewhere, so the "
            "scores would differ."
        )
    return bool(leading) if leading or behind else None
