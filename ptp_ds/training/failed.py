"""What stays of a population's member that failed: why and when, and the prompt that it kept, in its folder."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ptp_ds.errors import UserError
from ptp_ds.files import is_file, read_json, sha256_of, write_json, write_tensors
from ptp_ds.training.checkpoint import Checkpoint, is_best, is_count
from ptp_ds.training.continuation import Continuation
from ptp_ds.training.progress import Progress

FAILED = "failed.json"  # at which step it ended, the sentence, its identity, and the scores of the prompt that it kept
_KEPT = "kept.safetensors"  # a step that was scored need not have been saved
_HINT = "; put a copy back or start anew in another --output_dir"


def write_failure(folder: Path, sentence: str, progress: Progress, identity: dict[str, Any]) -> None:
    """The failure of a member behind step progress.step; identity: see Checkpoint. Rank 0 only."""
    digest = None
    if progress.best_prompt is not None:
        write_tensors(folder / _KEPT, {"best_prompt": progress.best_prompt})
        digest = sha256_of(folder / _KEPT)
    write_json(
        folder / FAILED,
        {"step": progress.step, "failed": sentence, "best": progress.best_record(), "sha256": digest,
         "identity": identity},
    )  # fmt: skip


def forget_failure(folder: Path) -> None:
    """The member trains from its start, or has come to its end alone. Rank 0 only."""
    for name in (FAILED, _KEPT):
        (folder / name).unlink(missing_ok=True)


def failure_in(folder: Path, saved: int = 0) -> str:
    """The sentence that ended a member; '' for one that has not failed, or has gone on since: saved is the step of its
    newest checkpoint, and none is saved behind a failure but by a run of the member alone."""
    if not is_file(folder / FAILED):
        return ""
    record = read_json(folder / FAILED, str(folder / FAILED))
    if not isinstance(record, dict) or (is_count(record.get("step")) and saved > record["step"]):
        return ""
    return str(record.get("failed", ""))


def take_failure(progress: Progress, folder: Path, identity: dict[str, Any]) -> None:
    """Puts a failed member's progress where it ended, with the prompt that it kept.

    UserError where that is damaged, or of a member with other settings. Older files don't say: the progress stays.
    """
    file = folder / FAILED
    record = read_json(file, str(file), _HINT)
    if not isinstance(record, dict) or "best" not in record:
        return
    step, best, before = (record.get(name) for name in ("step", "best", "identity"))
    if not is_count(step) or not isinstance(before, dict) or not (best is None or is_best(best)):
        raise UserError(f"{file} can't be read: it has no valid step, identity and best{_HINT}.")
    assert isinstance(step, int)
    Continuation(Checkpoint(step, {}, best, before), file).require_same(identity)
    progress.step, progress.best, progress.best_prompt = step, None, None
    if best is not None:
        progress.keep(best, _kept(folder / _KEPT, record.get("sha256")))


def _kept(file: Path, digest: Any) -> Tensor:
    if not is_file(file) or sha256_of(file) != digest:
        raise UserError(f"{file} is missing or altered (its sha256 differs){_HINT}.")
    return load_file(file)["best_prompt"]
