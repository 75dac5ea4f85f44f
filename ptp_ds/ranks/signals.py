"""Ctrl-C, SIGTERM and SIGUSR1 as a request that all ranks agree on between two steps."""

import os
import signal
import threading
import time
from types import FrameType

from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import STOP_SIGNALS

ECHO_SECONDS = 3.0  # a terminal and a launcher may both deliver one Ctrl-C; a second one comes later than that


class StopRequest:
    """Remembers a signal on any rank; `agreed` gives all ranks the same answer after the same step.

    Python hands signals to the main thread alone: a request made in another one leaves them to the program.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received = 0
        self._interrupted = 0.0
        numbers = STOP_SIGNALS if _in_main_thread() else ()
        self._previous = {number: signal.signal(number, self._note) for number in numbers}

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


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def end_at_once() -> None:
    """Before the first step, when there is nothing to save: a signal ends a launched rank even in a collective."""
    if "RANK" in os.environ and _in_main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM and SIGUSR1 have this from the start


def ignore_stop_signals() -> None:
    """After an agreed stop: launchers send SIGTERM to the ranks that leave a little later than the first."""
    if _in_main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
