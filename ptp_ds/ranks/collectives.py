"""A timed all-reduce and all-gather over all ranks: what `scripts/doctor.py` starts on a cluster before a run."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from ptp_ds.errors import UserError
from ptp_ds.ranks.distributed import Ranks, prepare_environment, start_processes, stop_processes
from ptp_ds.ranks.log import ANY_RANK, get_logger, log_to_console

log = get_logger(__name__)

MARK = "ptp_ds collectives "
_WARM_UPS, _REPEATS = 2, 5


def timed(ranks: Ranks, operation: Callable[[], object]) -> float:
    """Median seconds of an operation, the slowest rank's, after warm-ups."""
    seconds = []
    for number in range(_WARM_UPS + _REPEATS):
        ranks.barrier()
        start = time.perf_counter()
        operation()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()
        taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=ranks.device)
        if number >= _WARM_UPS:
            seconds.append(float(ranks.max(taken)))
    return median(seconds)


def measure(ranks: Ranks, mebibytes: int) -> dict[str, float]:
    """Seconds and result of an all-reduce of so many MiB, and of an all-gather that leaves as many on every rank.

    Raises ValueError where a collective gives a wrong sum or wrong parts: a link that garbles what it carries.
    """
    count = mebibytes * (1 << 20) // 4
    part = max(1, count // ranks.world)
    values = torch.ones(count, device=ranks.device)
    own = torch.full((part,), float(ranks.rank), device=ranks.device)
    parts = [torch.empty_like(own) for _ in range(ranks.world)]
    found = {
        "world": ranks.world,
        "mebibytes": mebibytes,
        "all_reduce": timed(ranks, lambda: ranks.sum(values)),
        "all_gather": timed(ranks, lambda: torch.distributed.all_gather(parts, own)),
    }
    summed = values.fill_(float(ranks.rank + 1))
    right = bool((ranks.sum(summed) == ranks.world * (ranks.world + 1) / 2).all())
    right &= all(bool((part == float(rank)).all()) for rank, part in enumerate(parts))
    if ranks.host_max(int(not right)):
        raise UserError("A collective gave wrong values on some rank; look at the network and its driver.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurement as one line of JSON on rank 0; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--local_rank", type=int, default=0, help="set by DeepSpeed's launcher")
    args = parser.parse_args(argv)
    log_to_console()
    prepare_environment()
    try:
        ranks = start_processes()
        found = measure(ranks, args.mebibytes)
        if ranks.is_main:
            print(MARK + json.dumps(found), flush=True)  # noqa: T201  (what scripts/doctor.py reads)
    except UserError as error:
        log.error("error: %s", error, extra=ANY_RANK)
        return 2
    finally:
        stop_processes()
    return 0


if __name__ == "__main__":
    sys.exit(main())
