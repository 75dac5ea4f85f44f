"""How a command ends: exit codes, and one sentence for a user's error or a lost rank."""

import os
import time
from collections.abc import Callable

from ptp_ds.errors import UserError
from ptp_ds.ranks.distributed import env_rank, stop_processes
from ptp_ds.ranks.faults import LOST_RANK, USER_ERROR, is_lost_rank
from ptp_ds.ranks.log import ANY_RANK, get_logger, log_to_console
from ptp_ds.ranks.quiet import quiet_libraries

log = get_logger(__name__)

_AFTER_THE_CAUSE = (
    3.0  # seconds; DeepSpeed's launcher looks at its ranks once a second, and takes the first code it finds
)


def run_command(body: Callable[[], int | None]) -> int:
    """The exit code of `body` (None: 0), the package's lines on the console; leaves the process group behind it.

    UserErrors are a sentence and exit code USER_ERROR, broken connections LOST_RANK. Whatever else is raised is a fault
    of the program: it passes, so that Python shows its traceback and exits with 1.
    """
    log_to_console()
    quiet_libraries()
    try:
        return body() or 0
    except UserError as error:
        return report_error(error)
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        return _report_lost(error)
    finally:
        stop_processes()


def report_error(error: UserError) -> int:
    """Says the sentence once a host, on rank 0 alone where there is one host, and returns exit code USER_ERROR.

    A launcher ends all ranks as soon as one exits, so a host's other ranks wait for its first one to speak and exit; a
    rank that nothing has ended by then failed alone, and speaks itself.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(30)
    rank = env_rank()
    log.error("%s: %s", "error" if rank == 0 else f"error on rank {rank}", error, extra=ANY_RANK)
    return USER_ERROR


def _report_lost(error: Exception) -> int:
    """Says that another rank is gone, and returns exit code LOST_RANK once a launcher has seen the other's."""
    cause = str(error).strip().split("\n")[0]
    log.error(
        "error on rank %d: another rank is gone, its connection broke (%s). The other lines tell the first cause; what "
        "was saved is whole, --resume auto goes on.", env_rank(), cause, extra=ANY_RANK,
    )  # fmt: skip
    time.sleep(_AFTER_THE_CAUSE)
    return LOST_RANK
