"""Which task and head an adapter serves: what its card says, held against what a command asks of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ptp_ds.adapters.read import read_card
from ptp_ds.backbone.heads import HeadPlan, plan_head
from ptp_ds.errors import UserError
from ptp_ds.files import listed
from ptp_ds.tasks import Task, load_task
from ptp_ds.tasks.template import parse_task


def adapter_task(adapter: str, name: str | None) -> Task:
    """The named task, or the one on the adapter's card; ValueError where neither says."""
    if name is not None:
        return load_task(name)
    spec = read_card(adapter).get("task")
    if not isinstance(spec, dict):
        raise UserError(f"Adapter {adapter} doesn't say which task it was trained on; give --task.")
    kept = {key: value for key, value in spec.items() if key != "answers" and value is not None}
    if spec.get("answers"):
        kept["candidates"] = spec["answers"]
    return parse_task(kept, f"Adapter {adapter}: the card's task")


def adapter_plan(adapter: str, config: Any, task: Task) -> tuple[HeadPlan, Task]:
    """The head that the adapter was trained with, and the task with its classes in the trained order."""
    card = read_card(adapter)
    plan = plan_head(config, (card.get("head") or {}).get("kind", "auto"), task)
    trained = list((card.get("task") or {}).get("answers") or task.answers)
    if plan.kind != "classes" or plan.choice or trained == list(task.answers):
        return plan, task
    if set(trained) != set(task.answers):
        raise UserError(
            f"The classifier of {adapter} tells {listed(trained)} apart; task {task.name} has "
            f"{', '.join(task.answers)}."
        )
    return plan, replace(task, answers={label: task.answers[label] for label in trained})


def ensemble_plan(adapters: Sequence[str], config: Any, task: Task) -> tuple[HeadPlan, Task]:
    """adapter_plan of all adapters; ValueError where they differ in head or order of classes."""
    found = [adapter_plan(adapter, config, task) for adapter in adapters]
    for adapter, (plan, theirs) in zip(adapters, found, strict=True):
        if plan != found[0][0] or list(theirs.answers) != list(found[0][1].answers):
            raise UserError(f"Adapters {adapters[0]} and {adapter} have different heads; an ensemble needs one kind.")
    return found[0]
