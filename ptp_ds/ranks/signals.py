"""Ctrl-C, SIGTERM and SIGUSR1 as a request that all ranks agree on between two steps."""

import os
import signal
import time
from types import FrameType

from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import STOP_SIGNALS

ECHO_SECONDS = 3.0  # a terminal and a launcher may both deliver one Ctrl-C; a second one comes later than that


class StopRequest:
    """Remembers a signal on any rank; `agreed` gives all ranks the same answer after the same step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received = 0
        self._interrupted = 0.0
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted and time.monotonic() - self._interrupted > ECHO_SECONDS:
                raise KeyboardInterrupt  # the second Ctrl-C doesn't wait for the step's end
            self._interrupted = self._interrupted or time.monotonic()
        self.received = self.received or number

    def agreed(self) -> int:
        """The signal number that some rank has received, 0 for none. Host to host: a GPU's queue is not waited for."""
        return self.ranks.host_max(self.received)

    def restore(self) -> None:
        """Gives the signals back to their former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def end_at_once() -> None:
    """Before the first step, when there is nothing to save: a signal ends a launched rank even in a collective."""
    if "RANK" in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM and SIGUSR1 have this from the start


def ignore_stop_signals() -> None:
    """After an agreed stop: launchers send SIGTERM to the ranks that leave a little later than the first."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
