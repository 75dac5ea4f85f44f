"""Which task and head an adapter serves: what its card says, held against what a command asks of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptp_ds.adapters.peft_format import CARD_FILE, CONFIG_FILE
from ptp_ds.adapters.read import adapter_config, read_card
from ptp_ds.errors import UserError
from ptp_ds.files import is_file, listed
from ptp_ds.models.heads import HeadPlan, plan_head
from ptp_ds.tasks import Task, load_task
from ptp_ds.tasks.template import parse_task

_HEAD_OF_TYPE = {"CAUSAL_LM": "causal", "SEQ_CLS": "classes", "SEQ_2_SEQ_LM": "seq2seq"}  # peft's, where they say it


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


def adapter_head(adapter: str | Path) -> str:
    """The kind of head that the adapter was trained with, auto where neither its card nor peft's task type says."""
    kind = (read_card(adapter).get("head") or {}).get("kind")
    if kind is not None or not is_file(Path(adapter) / CONFIG_FILE):
        return kind or "auto"
    said = adapter_config(adapter).get("task_type")
    return _HEAD_OF_TYPE.get(said, "auto") if isinstance(said, str) else "auto"


def adapter_plan(adapter: str | Path, config: Any, task: Task) -> tuple[HeadPlan, Task]:
    """The head that the adapter was trained with, and the task with its classes in the trained order."""
    card = read_card(adapter)
    plan = plan_head(config, adapter_head(adapter), task)
    trained = list((card.get("task") or {}).get("answers") or task.answers)
    if plan.kind != "classes" or plan.choice or trained == list(task.answers):
        return plan, task
    if set(trained) != set(task.answers):
        raise UserError(
            f"The classifier of {adapter} tells {listed(trained)} apart; task {task.name} has "
            f"{', '.join(task.answers)}."
        )
    return plan, replace(task, answers={label: task.answers[label] for label in trained})


def ensemble_plan(adapters: Sequence[str | Path], config: Any, task: Task) -> tuple[HeadPlan, Task]:
    """adapter_plan of all adapters; ValueError where they differ in head or order of classes."""
    found = [adapter_plan(adapter, config, task) for adapter in adapters]
    for adapter, (plan, theirs) in zip(adapters, found, strict=True):
        if plan != found[0][0] or list(theirs.answers) != list(found[0][1].answers):
            raise UserError(f"Adapters {adapters[0]} and {adapter} have different heads; an ensemble needs one kind.")
    return found[0]
