"""scripts/doctor.py: every host of a hostfile checked before a run; see ptp_ds.launch.doctor."""

import argparse
import os
from collections.abc import Sequence

from ptp_ds.commands.exits import run_command
from ptp_ds.config.parsers import doctor_parser
from ptp_ds.hosts.environment import shared_environment
from ptp_ds.hosts.hostfile import active_slots, named_hostfile
from ptp_ds.launch.doctor import examine, run_collectives
from ptp_ds.launch.doctor_report import Limits, find_faults, table
from ptp_ds.launch.quiet import hush_echoes
from ptp_ds.ranks.distributed import prepare_environment


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """scripts/doctor.py's flags; those that choose hosts are DeepSpeed's."""
    return doctor_parser().parse_args(argv)


def main(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Prints the table and the faults; returns 0 where there are none, 1 for faults, 2 for a wrong command line."""
    args = parse(argv)
    return run_command(lambda: _examine(args))


def _examine(args: argparse.Namespace) -> int:
    own = dict(os.environ)
    prepare_environment()
    args.hostfile = named_hostfile(args.hostfile)
    hush_echoes()
    slots = {host: len(numbers) for host, numbers in active_slots(args).items()}
    seen, faults = examine(args, list(slots), shared_environment(own))
    limits = Limits(slots, args.min_free_gb, args.min_memory_gb, args.max_skew)
    faults = [*faults, *find_faults(seen, limits)]
    print(table(list(slots), seen, faults))
    if not faults and not args.no_collectives:
        faults = run_collectives(args, sum(slots.values()))
    elif not args.no_collectives:
        print("all-reduce and all-gather: not run, because of the faults below")
    for fault in faults:
        print(f"fault: {fault.sentence} {fault.remedy}".rstrip())
    print(f"{len(faults)} fault(s) on {len(slots)} host(s)" if faults else f"{len(slots)} host(s), no fault")
    return 1 if faults else 0
