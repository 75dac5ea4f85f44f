"""A thread in each rank that ends it when nothing moves, and asks it to stop when its launcher is gone."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from ptp_ds.ranks.faults import STALLED
from ptp_ds.ranks.log import ANY_RANK, get_logger

log = get_logger(__name__)

_POLL = 1.0  # seconds


class Watchdog:
    """timeout: seconds that any one thing may take before the process ends (exit code STALLED); 0: no limit.

    A launched rank whose launcher dies sends itself SIGTERM, so that it saves and stops: no orphan trains on.
    """

    def __init__(self, timeout: float, rank: int, end: Callable[[int], object] = os._exit) -> None:
        self.timeout, self.rank, self._end = timeout, rank, end
        self._what, self._since = "starting", time.monotonic()
        self._watched = False
        self._parent = os.getppid() if "RANK" in os.environ else 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def doing(self, what: str) -> None:
        """Something new begins: the clock starts again, and from the first call on it counts."""
        self._what, self._since, self._watched = what, time.monotonic(), True

    def beat(self) -> None:
        """The same thing goes on and has moved, e.g. by one pass of an evaluation."""
        self._since = time.monotonic()

    def stop(self) -> None:
        """Ends the thread; safe to call twice."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        poll = min(_POLL, self.timeout / 4) if self.timeout else _POLL
        before = time.monotonic()
        while not self._stop.wait(poll):
            now = time.monotonic()
            if now - before > poll + 5:  # the process was suspended as a whole (Ctrl-Z, a sleeping machine)
                self._since = now
            before = now
            if self._parent and os.getppid() != self._parent:
                self._parent = 0
                log.warning("rank %d: its launcher is gone, which counts as SIGTERM", self.rank, extra=ANY_RANK)
                os.kill(os.getpid(), signal.SIGTERM)
            if self.timeout and self._watched and now - self._since > self.timeout:
                self._report(now - self._since)
                self._end(STALLED)
                return

    def _report(self, seconds: float) -> None:
        log.error(
            "error on rank %d: nothing has moved for %.0f s (--stall_timeout %g) in %s: this rank hangs, or waits for "
            "one that does. It ends now, its threads stood here; what was saved is whole, --resume auto goes on.",
            self.rank, seconds, self.timeout, self._what, extra=ANY_RANK,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
