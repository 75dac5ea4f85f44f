"""Lines of libraries that tell a user of the commands nothing new, left out one by one, by their text.

Everything else that a library warns of is heard. A program that imports the package decides itself what it hears.
"""

import logging
import sys

from ptp_ds.ranks.distributed import env_rank

_SAID_BY_US = (
    "Token indices sequence length is longer than",  # such rows are shortened, the run says how many
    "does not support setting its attention implementation dynamically",  # the generic path, which the run tells
)
_REPORT = "LOAD REPORT"  # absent and surplus tensors; those that nothing here trains are refused by their names
_STAYS = ("MISMATCH", "CONVERSION")  # in such a report: what we don't look at


def _is_new(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if _REPORT in message:
        return any(word in message for word in _STAYS)
    return not any(text in message for text in _SAID_BY_US)


def quiet_libraries() -> None:
    """For commands: transformers without the lines above, and its bars on a terminal alone. Safe to call again."""
    if "transformers" not in sys.modules:
        return
    from transformers.utils import logging as theirs

    theirs.get_verbosity()  # makes the handler, where nothing has been said yet
    for handler in logging.getLogger("transformers").handlers:
        if _is_new not in handler.filters:
            handler.addFilter(_is_new)
    if env_rank() or not sys.stderr.isatty():
        theirs.disable_progress_bar()
