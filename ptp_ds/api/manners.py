"""A guest's manners: what a run sets in the process for itself is as it was when it has ended."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ptp_ds.ranks.faults import STOP_SIGNALS
from ptp_ds.ranks.log import console_lines
from ptp_ds.ranks.quiet import quiet_libraries


@contextmanager
def as_it_was(verbose: bool) -> Iterator[None]:
    """Inside, a command's environment, signals, threads and, if `verbose`, lines; behind it the caller's own again."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS} if in_main else {}
    quiet_libraries()
    try:
        with console_lines(verbose):
            yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: not Python's own
                signal.signal(number, handler)
        torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
