"""Ctrl-C and SIGTERM as a request that all ranks agree on between two steps."""

import signal
from types import FrameType

from ptp_ds.distributed import Ranks

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers a signal on any rank; `agreed` gives all ranks the same answer after the same step."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received = 0
        self._previous = {number: signal.signal(number, self._note) for number in _HANDLED}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C doesn't wait for the step's end
        self.received = number

    def agreed(self) -> int:
        """The signal number that some rank has received, 0 for none. Host to host: a GPU's queue is not waited for."""
        return self.ranks.host_max(self.received)

    def restore(self) -> None:
        """Gives the signals back to their former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
