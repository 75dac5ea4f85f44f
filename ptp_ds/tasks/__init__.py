"""Tasks: how a data row becomes a context, answer candidates and a gold answer. A task is a template file, no code."""

from ptp_ds.tasks.metrics import Outcome, compute_metrics, majority_accuracy
from ptp_ds.tasks.readers import NoLabelError
from ptp_ds.tasks.template import Rendered, Task, builtin_tasks, load_task

__all__ = [
    "NoLabelError", "Outcome", "Rendered", "Task", "builtin_tasks", "compute_metrics", "load_task", "majority_accuracy",
]  # fmt: skip
