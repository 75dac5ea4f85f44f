"""Ctrl-C and SIGTERM as a request that all ranks agree on between two steps."""

import signal
from types import FrameType

import torch

from ptp_ds.distributed import Ranks

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers a signal on any rank; `agreed` gives all ranks the same answer after the same step.

    The flag of step t is reduced without waiting and read after step t+1, so a GPU's queue is never drained for it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received = 0
        self._pending: tuple[torch.Tensor, object] | None = None
        self._previous = {number: signal.signal(number, self._note) for number in _HANDLED}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C doesn't wait for the step's end
        self.received = number

    def agreed(self) -> int:
        """The signal number that some rank had received by the end of the previous step, 0 for none."""
        if self.ranks.world == 1:
            return self.received
        earlier = self._pending
        flag = torch.tensor([self.received], dtype=torch.int32, device=self.ranks.device)
        work = torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = (flag, work)
        if earlier is None:
            return 0
        earlier[1].wait()  # type: ignore[attr-defined]
        return int(earlier[0].item())

    def restore(self) -> None:
        """Gives the signals back to their former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
