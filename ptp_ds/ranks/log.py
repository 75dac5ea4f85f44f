"""What the package says: loggers below `ptp_ds`, heard on rank 0 alone and without secrets; how commands print it.

A program that imports the package decides itself what it sees, as with any library. Commands call `log_to_console`.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ptp_ds.redact import redacted

ANY_RANK = {"any_rank": True}  # log.error(text, extra=ANY_RANK): heard whatever the rank
_ROOT = "ptp_ds"


class _Heard(logging.Filter):
    """Rank 0's records and those for any rank; secrets are replaced."""

    def filter(self, record: logging.LogRecord) -> bool:
        if os.environ.get("RANK", "0") != "0" and not getattr(record, "any_rank", False):
            return False
        record.msg, record.args = redacted(record.getMessage()), None
        return True


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, by its __name__."""
    logger = logging.getLogger(name)
    if not any(isinstance(present, _Heard) for present in logger.filters):
        logger.addFilter(_Heard())
    return logger


class _Console(logging.Handler):
    """Lines as they are on the standard output that is current, or, from warnings on, on standard error."""

    def __init__(self, errors: bool) -> None:
        super().__init__(logging.WARNING if errors else logging.INFO)
        self.errors = errors
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self.errors:
            with suppress(OSError):  # a launcher that ended may have taken standard error along
                print(self.format(record), file=sys.stderr, flush=True)
        elif record.levelno < logging.WARNING:
            _print_past_bar(self.format(record))


def _print_past_bar(text: str) -> None:
    """One line on standard output, past a progress bar."""
    try:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(text, flush=True)
    except BrokenPipeError:  # the launcher, or a pager, is gone: the run still saves and stops as asked
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def log_to_console() -> None:
    """For commands: everything that the package says, on this process' own output. Safe to call again.

    Two handlers, so that a line on standard error doesn't wait for a pipe behind standard output.
    """
    logger = logging.getLogger(_ROOT)
    if not any(isinstance(handler, _Console) for handler in logger.handlers):
        for errors in (False, True):
            logger.addHandler(_Console(errors))
        logger.setLevel(logging.INFO)
        logger.propagate = False


def is_heard() -> bool:
    """Whether anybody has asked for the package's lines: a command has, and a program by a handler of its own."""
    return bool(logging.getLogger(_ROOT).handlers)


@contextmanager
def console_lines(spoken: bool) -> Iterator[None]:
    """For calls from a program: inside, the package's lines are printed if `spoken`; behind it no longer.

    A program whose own handlers are on the package's logger hears it by them; those that it adds meanwhile stay.
    """
    logger = logging.getLogger(_ROOT)
    if not spoken or logger.handlers:
        yield
        return
    level, propagate = logger.level, logger.propagate
    log_to_console()
    try:
        yield
    finally:
        for handler in [one for one in logger.handlers if isinstance(one, _Console)]:
            logger.removeHandler(handler)
        if logger.level == logging.INFO:
            logger.setLevel(level)
        logger.propagate = logger.propagate or propagate
