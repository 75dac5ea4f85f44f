"""What can befall a run, as exit codes and sentences: stop signals, a rank that stalls or is lost, a failing disk."""

import errno
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from ptp_ds.errors import UserError
from ptp_ds.ranks.distributed import Ranks

# SIGUSR1 is what Slurm can send before it preempts a job.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
USER_ERROR = 2
STALLED = 75  # --stall_timeout
LOST_RANK = 76  # another rank's connection broke
_CHECKPOINTS = ("checkpoints/step-*", "members/*/checkpoints/step-*")  # in a run's folder, or a population's
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how safetensors names errno
_BROKEN = ("closed by peer", "reset by peer", "Broken pipe", "Socket closed", "remote process exited", "Timed out",
           "timed out", "Connection refused", "communicator was aborted", "ncclRemoteError")  # fmt: skip
_FULL = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")  # where it is no OutOfMemoryError


class OutputError(UserError):
    """A file of the run could not be written; all ranks raise it at the same place."""


def shell_code(returncode: int) -> int:
    """A process' return code as a shell tells it: 128 + n where signal n ended it."""
    return returncode if returncode >= 0 else 128 - returncode


def is_stop(code: int) -> bool:
    """Whether a shell_code tells of a stop that somebody asked for."""
    return code in {128 + number for number in STOP_SIGNALS}


def explain_code(code: int) -> str:
    """A shell_code in words."""
    if code == 128 + signal.SIGKILL:
        return "was killed by SIGKILL, by hand or by the system for lack of memory"
    if code == STALLED:
        return "ended itself because nothing moved for --stall_timeout seconds"
    if code == LOST_RANK:
        return "lost the connection to another rank"
    if 128 < code < 160:
        return f"was ended by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code}"


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error out of a collective means that another rank is gone."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _BROKEN)


def befell(error: BaseException) -> bool:
    """Whether an error tells of full memory or of a lost rank, and so nothing of the code that it came out of."""
    full = isinstance(error, RuntimeError) and any(part in str(error) for part in _FULL)
    return full or isinstance(error, torch.OutOfMemoryError | MemoryError) or is_lost_rank(error)


def disk_sentence(error: Exception, folder: Path) -> str:
    """One sentence for a file that could not be written below a run's `folder`, and what to do."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(str(error))):
        number = int(found[1])
    reason = os.strerror(number) if number is not None else str(error)
    remedy = {
        errno.EROFS: "make it writable", errno.EACCES: "make it writable", errno.EPERM: "make it writable",
        errno.ENOSPC: "make room on that disk", errno.EDQUOT: "make room under the quota",
        errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    }.get(number or 0, "check that disk")  # fmt: skip
    if not any(any(Path(folder).glob(pattern)) for pattern in _CHECKPOINTS):
        return f"Can't write to {folder}: {reason}; nothing had been saved yet: {remedy} and start again."
    return f"Can't write to {folder}: {reason}. What was saved before is whole: {remedy} and go on with --resume auto."


class OutputGuard:
    """Rank 0 writes, all ranks learn of a failure at the same place: none is left waiting for another.

    resumes: whether --resume auto goes on behind it.
    """

    def __init__(self, ranks: Ranks, folder: Path, resumes: bool = True) -> None:
        self.ranks, self.folder, self._resumes = ranks, folder, resumes
        self._failure: str | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps a failure to write for `agree`; what comes behind it on this rank goes on.

        Of what is ours alone: nothing that a caller has handed in is called inside, whose own errors would be taken for
        the disk's.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            if self._failure is None:
                self._failure = disk_sentence(error, self.folder) if self._resumes else str(error)

    @property
    def failed(self) -> bool:
        """Whether this rank has failed to write."""
        return self._failure is not None

    def agree(self) -> None:
        """Raises OutputError on every rank where one has failed to write; all ranks must call it."""
        if self.ranks.host_max(int(self.failed)):
            raise OutputError(self._failure or f"Another rank can't write to {self.folder}; see its own line.")
