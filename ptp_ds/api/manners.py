"""A guest's manners: what a call sets in the process for itself is taken back when it has ended, and nothing else:
other threads of the program go on meanwhile, one of them perhaps training.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ptp_ds.ranks.distributed import prepare_environment
from ptp_ds.ranks.faults import STOP_SIGNALS
from ptp_ds.ranks.log import console_lines
from ptp_ds.ranks.quiet import quiet_libraries
from ptp_ds.ranks.variables import OWN_VARIABLES


@contextmanager
def own_environment() -> Iterator[None]:
    """Inside, a command's environment; behind the last call inside, in whatever thread, the program's own again."""
    with OWN_VARIABLES.taken_back():
        prepare_environment()
        quiet_libraries()
        yield


@contextmanager
def as_it_was(verbose: bool) -> Iterator[None]:
    """own_environment for a run, which sets signals, this thread's number of threads and, if `verbose`, lines, too."""
    threads = torch.get_num_threads()
    in_main = threading.current_thread() is threading.main_thread()  # no other one may set signals
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS} if in_main else {}
    try:
        with own_environment(), console_lines(verbose):
            yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: not Python's own
                signal.signal(number, handler)
        if torch.get_num_threads() != threads:  # setting it, even to what it is, sets it for new threads, too
            torch.set_num_threads(threads)
