"""The members of a population before it starts: each prepared as a run, all fit for one job, in step at a resume."""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ptp_ds.commands.one_run import prepare
from ptp_ds.config.batch import gives_batch
from ptp_ds.config.population import NO_FP16, members_of
from ptp_ds.config.run_config import RunConfig
from ptp_ds.errors import UserError
from ptp_ds.files import is_file, listed, read_json
from ptp_ds.packing.layouts import TreeRows
from ptp_ds.ranks.log import get_logger
from ptp_ds.training.checkpoint import load_checkpoint, newest_whole, saved_steps, step_folder
from ptp_ds.training.continuation import Continuation, checked_output_dir
from ptp_ds.training.failed import failure_in
from ptp_ds.training.prepared import Prepared
from ptp_ds.training.trackers import require_trackers

log = get_logger(__name__)
_PREPARES = "ptp_ds.commands.one_run"

Changes = Mapping[str, Mapping[str, Any]]  # by a member's name, what differs from the run


@contextmanager
def said_once(logger: str) -> Iterator[None]:
    """Inside, what the logger says twice is heard once: members share most of their warnings."""
    heard: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in heard or heard.add(message))  # type: ignore[func-returns-value]

    logging.getLogger(logger).addFilter(is_new)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(is_new)


@contextmanager
def errors_of_member(name: str) -> Iterator[None]:
    """Inside, a UserError says whose it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"Member {name}: {error}") from None


def prepare_population(
    run: RunConfig, explicit: Collection[str], changes: Changes | None = None
) -> dict[str, Prepared]:
    """Every member, prepared as a run of its own in members/<name> of --output_dir; see one_run.prepare.

    changes: see members_of.
    """
    require_trackers(run.report_to)
    if run.seeds is not None and "seed" in explicit:
        raise UserError("--seed and --seeds both say which seeds train; give one of them.")
    members = members_of(run, changes)
    folder, found = checked_output_dir(run, several=True), {}
    if folder is not None:
        _require_recorded(folder, members)
    given, batch = set(explicit) - {"seeds", "population"}, _saved_batch(run, explicit, folder, members)
    if batch is not None:
        given |= {"batch_size"}
        members = {name: replace(member, batch_size=batch) for name, member in members.items()}
    with said_once(_PREPARES):
        for name, member in members.items():
            where = None if folder is None else str(folder / "members" / name)
            own = replace(member, output_dir=where, resume=run.resume if where is not None else None)
            with errors_of_member(name):
                found[name] = prepare(own, given)
            if found[name].resolved.dtype is torch.float16:
                raise UserError(f"--ds_config {run.ds_config} enables fp16, which {NO_FP16}")
    _require_one_form(found)
    return _in_step(found)


def _require_recorded(folder: Path, members: Collection[str]) -> None:
    """UserError where the folder's population.json, to be written anew, lists a member that isn't among these."""
    file = folder / "population.json"
    if not is_file(file):
        return
    record = read_json(file, str(file))
    listing = record.get("members") if isinstance(record, dict) else None
    names = [str(one["name"]) for one in listing or () if isinstance(one, dict) and "name" in one]
    if missing := [name for name in names if name not in members]:
        raise UserError(
            f"--output_dir {folder} holds a run of {listed(names)}, and {listed(missing)} would not be in it any more; "
            "continue it with all of them or give a new folder."
        )


def _saved_batch(
    run: RunConfig, explicit: Collection[str], folder: Path | None, members: Collection[str]
) -> int | None:
    """The batch size that members go on with where none is given: that of the first one that has saved anything."""
    if run.resume is None or folder is None or gives_batch(run, explicit):
        return None
    for name in members:
        with suppress(UserError):  # of damaged checkpoints: prepare says it
            _, checkpoint, _ = newest_whole(folder / "members" / name)
            if (found := Continuation(checkpoint).batch_size) is not None:
                return found
    return None


def _require_one_form(members: Mapping[str, Prepared]) -> None:
    """UserError where members need different heads, or rows that don't stand behind their prompts alike."""
    for what, form_of in (("their heads", _head), ("where their prompts stand", _place)):
        forms: dict[str, list[str]] = {}
        for name, one in members.items():
            forms.setdefault(form_of(one), []).append(name)
        if len(forms) > 1:
            found = "; ".join(f"{form} for {listed(names)}" for form, names in forms.items())
            raise UserError(f"Members differ in {what}: {found}; train those that are alike in one population each.")


def _head(prepared: Prepared) -> str:
    plan = prepared.source.head_plan
    if plan.kind != "classes":
        return plan.kind
    return "a classifier with one output an answer" if plan.choice else f"a classifier of {plan.outputs} classes"


def _place(prepared: Prepared) -> str:
    if isinstance(prepared.rows, TreeRows):
        return "in front of every row's text"
    return "in each row, by the text's <prompt>" if prepared.rows.kind == "causal" else "in each row"


def _in_step(members: dict[str, Prepared]) -> dict[str, Prepared]:
    """The members going on from the newest step that all of them have saved: one may have saved a step more. Those that
    had failed or ended by then stay where they were.
    """
    going = {name: one for name, one in members.items() if goes_on(one)}
    newest = {name: _step(one) for name, one in going.items()}
    if len(set(newest.values())) < 2:
        return members
    if unsaved := [name for name, step in newest.items() if not step]:
        log.warning("warning: %s had saved nothing: all members start anew", listed(unsaved))
        return {**members, **{name: replace(one, continuation=Continuation()) for name, one in going.items()}}
    saved = {name: _saved(one) for name, one in going.items()}
    for step in sorted(set.intersection(*saved.values()), reverse=True):
        with said_once(__name__):
            if behind := _behind(step, going):
                return {**members, **behind}
    steps = "; ".join(f"{name} {', '.join(map(str, sorted(own)))}" for name, own in saved.items())
    raise UserError(
        f"--resume auto: there is no step that all members have saved ({steps}); put checkpoints back, give members "
        "that --patience had ended their old one, go on with each alone (--output_dir OUTPUT_DIR/members/NAME --resume "
        "auto), or start in another --output_dir."
    )


def _step(prepared: Prepared) -> int:
    """That of the newest whole checkpoint, 0 for none."""
    checkpoint = prepared.continuation.checkpoint
    return checkpoint.step if checkpoint is not None else 0


def _saved(prepared: Prepared) -> set[int]:
    """Steps that a member has saved; newer ones than its newest whole checkpoint's are damaged."""
    assert prepared.output_dir is not None
    return {step for step in saved_steps(prepared.output_dir / "checkpoints") if step <= _step(prepared)}


def _behind(step: int, members: Mapping[str, Prepared]) -> dict[str, Prepared]:
    """The members going on from step `step`; none, and a warning, where a checkpoint of it is damaged."""
    found = {}
    for name, one in members.items():
        assert one.output_dir is not None
        if _step(one) == step:
            found[name] = one
            continue
        folder = step_folder(one.output_dir / "checkpoints", step)
        try:
            continuation = Continuation(load_checkpoint(folder), folder)
        except UserError as error:
            log.warning("warning: %s; going on from a step before", str(error).split(";")[0])
            return {}
        for sentence in continuation.require_same(one.identity):
            log.warning("warning: %s", sentence)
        found[name] = replace(one, continuation=continuation)
    return found


def goes_on(prepared: Prepared) -> bool:
    """Whether the member neither had failed nor ended early before the job was resumed."""
    return not failure_of(prepared) and not _has_ended(prepared)


def _has_ended(prepared: Prepared) -> bool:
    """Whether --patience or a callback ended the member before the job was resumed."""
    checkpoint, patience = prepared.continuation.checkpoint, prepared.run.patience
    if checkpoint is None:
        return False
    return checkpoint.ended or bool(patience and checkpoint.best and checkpoint.best.get("stale", 0) >= patience)


def failure_of(prepared: Prepared) -> str:
    """The sentence that ended a member before the job was resumed; '' for one that goes on."""
    if prepared.run.resume is None or prepared.output_dir is None:
        return ""
    return failure_in(prepared.output_dir, _step(prepared))
