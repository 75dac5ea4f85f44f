"""A job on several hosts as it runs: DeepSpeed's launcher in a process of its own, signals taken to the ranks.

DeepSpeed's own answer to a signal ends pdsh, so that the ranks' output is cut off, runs `pkill -f` on every host, which
ends the user's other jobs too, and doesn't wait. Here its launcher sees no signal: the ranks get it over ssh, save, and
end in their own time; the launcher ends with them. When a host's ranks fail, the other hosts' ranks are ended too.
"""

import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import NoReturn, TextIO, TypeVar

from ptp_ds.errors import UserError
from ptp_ds.hosts.remote import HostError, ask_all
from ptp_ds.launch.job_plan import Job
from ptp_ds.ranks.faults import STOP_SIGNALS, USER_ERROR
from ptp_ds.ranks.log import ANY_RANK, get_logger

log = get_logger(__name__)

_T = TypeVar("_T")
_FAILED = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")  # pdsh's line for a host whose ranks failed
_POLL_SECONDS = 0.2
_START_SECONDS = 60.0  # how long a signal waits for ranks that haven't started yet
_GRACE_SECONDS = 30.0  # how long the other hosts' ranks may take to notice that one host's have failed


def run_job(job: Job, launch: Callable[[], None]) -> int:
    """Runs `launch` (DeepSpeed's launcher) in a child and waits for it; returns its exit code, or that of the host
    whose ranks failed first: pdsh tells the largest of all hosts', which may be that of ranks that were ended for it.
    """
    signals: SimpleQueue[int] = SimpleQueue()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, frame: signals.put(received))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _become(launch, writer)
    os.close(writer)
    failures: SimpleQueue[tuple[str, int]] = SimpleQueue()
    relay = threading.Thread(target=_relay, args=(os.fdopen(reader, errors="replace"), failures), daemon=True)
    relay.start()
    watch = _Watch(job, child, signals, failures)
    code = watch.wait()
    relay.join(timeout=5)
    return watch.cause_of(code)


def _become(launch: Callable[[], None], errors: int) -> NoReturn:
    """The child: out of the terminal's reach, its errors read by the parent."""

    def run() -> None:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(errors, 2)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        try:
            launch()
        except UserError as error:
            log.error("error: %s", error, extra=ANY_RANK)
            sys.exit(USER_ERROR)

    end_fork(run)


def end_fork(body: Callable[[], object]) -> NoReturn:
    """Runs `body` in a fork and ends the process as python would, with nothing of the parent's exit handlers."""
    code = 1
    try:
        body()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _relay(lines: TextIO, failures: "SimpleQueue[tuple[str, int]]") -> None:
    """Passes the child's errors on, and notes hosts that pdsh reports as failed."""
    for line in lines:
        sys.stderr.write(line)
        sys.stderr.flush()
        if found := _FAILED.match(line):
            failures.put((found[1], int(found[2])))


class _Watch:
    """Waits for the child; meanwhile takes signals to the ranks, and ends what a failed host has left waiting."""

    def __init__(self, job: Job, child: int, signals: "SimpleQueue[int]", failures: "SimpleQueue[tuple[str, int]]"):
        self.job, self.child, self.signals, self.failures = job, child, signals, failures
        self.asked: int | None = None  # the signal that ranks still have to get
        self.asked_at = 0.0
        self.stopping = False  # ranks were asked to stop: the first host to end hasn't failed, others may still save
        self.failed_at: float | None = None
        self.first_code = 0  # of the host that failed first
        self.sent = 0  # how often ranks of a failed job were told to end

    def wait(self) -> int:
        """The child's exit code, when no rank is left."""
        while True:
            ended, status = os.waitpid(self.child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                if code:
                    self._sweep()
                return code if code >= 0 else 128 - code
            self._serve_signals()
            self._serve_failures()
            time.sleep(_POLL_SECONDS)

    def cause_of(self, code: int) -> int:
        """The first failed host's code in the place of the child's, which ended with `code`; a stop keeps its own."""
        self._note_failures()
        return self.first_code if code and self.first_code and not self.stopping else code

    def _serve_signals(self) -> None:
        received = _next(self.signals)
        if received is not None:
            self.asked, self.asked_at, self.stopping = received, time.monotonic(), True
            _warn("%s: passed on to the ranks of %d host(s)", signal.Signals(received).name, len(self.job.hosts))
        if self.asked is None:
            return
        reached = tell_ranks(self.job, self.asked)
        if reached:
            self.asked = None
        elif time.monotonic() - self.asked_at > _START_SECONDS:
            _warn("no rank was found to stop: ending DeepSpeed's launcher")
            os.killpg(self.child, signal.SIGTERM)
            self.asked = None

    def _note_failures(self) -> None:
        while (failure := _next(self.failures)) is not None:
            if self.failed_at is None:
                self.failed_at, self.first_code = time.monotonic(), failure[1]

    def _serve_failures(self) -> None:
        self._note_failures()
        if (
            self.failed_at is None
            or self.stopping
            or time.monotonic() - self.failed_at < _GRACE_SECONDS * (self.sent + 1)
        ):
            return
        number = signal.SIGTERM if self.sent == 0 else signal.SIGKILL
        _warn("a host's ranks failed %.0f s ago: %s to the ranks that still wait for them", _GRACE_SECONDS, number.name)
        tell_ranks(self.job, number)
        self.sent += 1

    def _sweep(self) -> None:
        """After a failure: ranks that outlived the launcher, on hosts that it lost, are ended."""
        if tell_ranks(self.job, signal.SIGTERM):
            end = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < end and tell_ranks(self.job, 0, loud=False):
                time.sleep(1)
            tell_ranks(self.job, signal.SIGKILL, loud=False)


def tell_ranks(job: Job, number: int, loud: bool = True) -> int:
    """Sends a signal to all ranks of a job on all its hosts at once; returns how many were there (0: count alone).

    loud: says which hosts gave no answer.
    """
    requests = {host: {"signal": [job.key, int(number)]} for host in job.hosts}
    reached = 0
    for host, reply in ask_all(job.hosts, requests, job.ssh_port, timeout=30).items():
        if not isinstance(reply, HostError):
            reached += reply["ranks"]
        elif loud:
            _warn("%s may still hold ranks of this job: %s", host, reply)
    return reached


def _next(queue: "SimpleQueue[_T]") -> _T | None:
    try:
        return queue.get_nowait()
    except Empty:
        return None


def _warn(text: str, *values: object) -> None:
    log.warning(f"launcher: {text}", *values, extra=ANY_RANK)
