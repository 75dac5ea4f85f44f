"""DeepSpeed's launcher, quiet where it buries what the ranks say; its warnings and errors stay."""

import itertools
import logging
import re
from collections.abc import Sequence

from ptp_ds.ranks.faults import USER_ERROR, is_stop, shell_code

_EXIT = re.compile(r"exits with return code = (-?\d+)$")
_BAD_HOSTFILE = "Bad hostfile text: "  # behind it comes an error, which says which line


def quiet_flags(argv: Sequence[str]) -> list[str]:
    """DeepSpeed's own flag for a quiet launcher, at INFO by default; none where the user has chosen a level."""
    own = itertools.takewhile(lambda word: not word.endswith(".py"), argv)
    chosen = any(word in ("-q", "--quiet") or word.startswith("--log_level") for word in own)
    return [] if chosen else ["--log_level=warning"]


def _is_new(record: logging.LogRecord) -> bool:
    """Not the whole command line again behind a user's error or a stop, whose sentence has been said."""
    message = record.getMessage()
    if found := _EXIT.search(message):
        code = shell_code(int(found[1]))
        return code != USER_ERROR and not is_stop(code)
    return not message.startswith(_BAD_HOSTFILE)


def hush_echoes() -> None:
    """From now on DeepSpeed's logger leaves out what repeats a sentence that a user has read. Safe to call again."""
    from deepspeed.utils import logger

    if _is_new not in logger.filters:
        logger.addFilter(_is_new)
