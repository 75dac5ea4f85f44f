"""Which task and head an adapter serves: what its card says, held against what a command asks of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ptp_ds.adapters.peft_format import CARD_FILE, CONFIG_FILE, IN_TEXT_TYPE
from ptp_ds.adapters.read import adapter_config, head_shapes, read_card, read_head
from ptp_ds.errors import UserError
from ptp_ds.files import brief, is_file, listed
from ptp_ds.models.heads import HeadPlan, is_encoder, plan_head
from ptp_ds.ranks.log import get_logger
from ptp_ds.tasks import Task, load_task
from ptp_ds.tasks.template import parse_task

log = get_logger(__name__)
_HEAD_OF_TYPE = {"CAUSAL_LM": "causal", "SEQ_CLS": "classes", "SEQ_2_SEQ_LM": "seq2seq"}  # peft's, where they say it
_READS_ROWS = ("name", "text", "answers", "values", "truncate", "reader")  # a task's: how rows and answers read


def adapter_task(adapter: str | Path, name: str | None) -> Task:
    """The named task, or the one on the adapter's card; ValueError where neither says."""
    if name is not None:
        return load_task(name)
    spec = read_card(adapter).get("task")
    if not isinstance(spec, dict):
        why = (
            f"it has no {CARD_FILE}, as peft's own" if not is_file(Path(adapter) / CARD_FILE) else "its card names none"
        )
        raise UserError(f"Adapter {adapter} doesn't say which task it was trained on ({why}); give --task.")
    kept = {key: value for key, value in spec.items() if key != "answers" and value is not None}
    if spec.get("answers"):
        kept["candidates"] = spec["answers"]
    return parse_task(kept, f"Adapter {adapter}: the card's task")


def ensemble_task(adapters: Sequence[str | Path], name: str | None) -> Task:
    """The named task, or the first adapter's, which every other that has a card must have been trained on, too.

    ValueError: see adapter_task; and for an adapter whose rows would read otherwise, or be answered otherwise.
    """
    first, *others = adapters
    task = adapter_task(first, name)
    if name is None:
        for adapter in others:
            if isinstance(read_card(adapter).get("task"), dict):
                _require_same(first, task, adapter, adapter_task(adapter, None))
    return task


def _require_same(first: str | Path, task: Task, adapter: str | Path, theirs: Task) -> None:
    for part in _READS_ROWS:
        if getattr(task, part) != getattr(theirs, part):
            raise UserError(
                f"Adapters {first} and {adapter} were trained on different tasks: {part} is "
                f"{brief(getattr(task, part))} and {brief(getattr(theirs, part))}; an ensemble needs adapters of one "
                "task, or --task to say which one all of them answer."
            )


def adapter_head(adapter: str | Path) -> str:
    """The kind of head that the adapter was trained with, auto where neither its card nor peft's task type says."""
    kind = (read_card(adapter).get("head") or {}).get("kind")
    if kind is not None or not is_file(Path(adapter) / CONFIG_FILE):
        return kind or "auto"
    said = adapter_config(adapter).get("task_type")
    return _HEAD_OF_TYPE.get(said, "auto") if isinstance(said, str) else "auto"


def adapter_plan(adapter: str | Path, config: Any, task: Task) -> tuple[HeadPlan, Task]:
    """The head that the adapter was trained with, and the task with its classes in the trained order.

    ValueError for a classifier of other classes, or on a model that is no encoder.
    """
    plan = plan_head(config, adapter_head(adapter), task)
    if plan.kind == "classes" and not is_encoder(config):
        raise UserError(
            f"Adapter {adapter} is a classifier's, on a model of family {config.model_type!r}; classifiers are served "
            "here on encoders alone, so take peft and transformers for it, or train an adapter with --head causal."
        )
    if plan.kind != "classes" or plan.choice:
        return plan, task
    trained = _classes(adapter, config, task)
    if trained == list(task.answers):
        return plan, task
    if set(trained) != set(task.answers):
        raise UserError(
            f"The classifier of {adapter} tells {listed(trained)} apart; task {task.name} has "
            f"{', '.join(task.answers)}."
        )
    return plan, replace(task, answers={label: task.answers[label] for label in trained})


def _classes(adapter: str | Path, config: Any, task: Task) -> list[str]:
    """The labels that a classifier's outputs stand for, in order: the card's. peft's own adapters have no card; then
    those that the base model's config.json names, where they are the task's, else, with a warning, the task's.
    """
    if told := (read_card(adapter).get("task") or {}).get("answers"):
        return list(told)
    labels = list(task.answers)
    places = {str(name).casefold(): place for place, name in (getattr(config, "id2label", None) or {}).items()}
    if len(places) == len(labels) and places.keys() == {label.casefold() for label in labels}:
        return sorted(labels, key=lambda label: places[label.casefold()])
    log.warning(
        "warning: adapter %s doesn't say which class is which: its classifier's outputs are taken as %s, the order of "
        "task %s's verbalizers; --task with a template in the trained order mends it where it was another",
        adapter, listed([f"{number} {label}" for number, label in enumerate(labels)]), task.name,
    )  # fmt: skip
    return labels


def starting_head(adapter: str | Path, config: Any, plan: HeadPlan, task: Task) -> dict[str, Tensor]:
    """What was trained beside an adapter's prompt, for a run that starts from it, by the model's names.

    config: the model's. {} for a prompt alone, and, with a warning, where the run's head is another or tells other
    classes apart, or the same ones in another order. Whether the shapes are the model's is seen when it is loaded.
    """
    shapes = head_shapes(adapter)
    if not shapes:
        return {}
    if plan.kind != "classes":
        why = f"this run has a {plan.kind} head"
    elif not plan.choice and (trained := _classes(adapter, config, task)) != list(task.answers):
        why = f"it tells {listed(trained)} apart, and task {task.name} has {listed(task.answers)}"
    else:
        return read_head(adapter, shapes)
    log.warning("warning: the classifier of %s is left out, only its prompt is taken: %s", adapter, why)
    return {}


def ensemble_plan(adapters: Sequence[str | Path], config: Any, task: Task) -> tuple[HeadPlan, Task]:
    """adapter_plan of all adapters; ValueError where they differ in head, order of classes or the prompt's place."""
    in_text = [adapter_config(adapter).get("peft_type") == IN_TEXT_TYPE for adapter in adapters]
    for adapter, inside in zip(adapters, in_text, strict=True):
        if inside != in_text[0]:
            front, within = (adapters[0], adapter) if inside else (adapter, adapters[0])
            raise UserError(
                f"Adapter {within} has its prompt inside the text, {front} in front of it; an ensemble needs one place."
            )
    found = [adapter_plan(adapter, config, task) for adapter in adapters]
    for adapter, (plan, theirs) in zip(adapters, found, strict=True):
        if plan != found[0][0] or list(theirs.answers) != list(found[0][1].answers):
            raise UserError(f"Adapters {adapters[0]} and {adapter} have different heads; an ensemble needs one kind.")
    return found[0]
