"""The words that a prompt begins at where a run names none: its task's instruction."""

from dataclasses import replace

from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.tasks.template import Task, load_task


def with_instruction(run: RunConfig, task: Task | None = None) -> RunConfig:
    """The run with the instruction of its task as init_text, where --prompt_init text came without one.

    task: the run's, read here without. UserError where its template has no instruction.
    """
    if run.prompt_init != "text" or run.init_text is not None:
        return run
    task = task or load_task(run.task)
    if task.instruction is None:
        raise UserError(
            f"--prompt_init text begins at --init_text 'some words' or at the task's instruction, and the template of "
            f"{task.name} has none; give one of the two."
        )
    return replace(run, init_text=task.instruction)
