"""scripts/doctor.py: every host of a hostfile checked before a run; see ptp_ds.launch.doctor."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ptp_ds.commands.exits import run_command
from ptp_ds.errors import UserError
from ptp_ds.hosts.environment import shared_environment
from ptp_ds.hosts.hostfile import active_slots
from ptp_ds.launch.doctor import examine, run_collectives
from ptp_ds.launch.doctor_report import Limits, find_faults, table
from ptp_ds.launch.quiet import hush_echoes
from ptp_ds.ranks.distributed import prepare_environment


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """scripts/doctor.py's flags; those that choose hosts are DeepSpeed's."""
    parser = argparse.ArgumentParser(description="Checks every host of a hostfile before a run.")
    parser.add_argument("-H", "--hostfile", required=True, help="as for the deepspeed command")
    parser.add_argument("-i", "--include", default="", help="as for the deepspeed command")
    parser.add_argument("-e", "--exclude", default="", help="as for the deepspeed command")
    parser.add_argument("--num_nodes", type=int, default=-1, help="as for the deepspeed command")
    parser.add_argument("--num_gpus", type=int, default=-1, help="as for the deepspeed command")
    parser.add_argument("--ssh_port", type=int, help="as for the deepspeed command")
    parser.add_argument("--model", help="the run's --model: its files must be the same on every host")
    parser.add_argument("--output_dir", help="the run's --output_dir: must be writable, with room")
    parser.add_argument("--min_free_gb", type=float, default=1.0, help="free space in the output folder, GB")
    parser.add_argument("--min_memory_gb", type=float, default=4.0, help="free host memory, GB")
    parser.add_argument("--max_skew", type=float, default=2.0, help="seconds between a host's clock and this one's")
    parser.add_argument("--full_hash", action="store_true", help="read large weight files whole, not 64 MiB of each")
    parser.add_argument("--mebibytes", type=int, default=64, help="size of the timed collectives, MiB")
    parser.add_argument("--no_collectives", action="store_true", help="ask the hosts alone, start no ranks")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and the faults; returns 0 where there are none, 1 for faults, 2 for a wrong command line."""
    args = parse(argv)
    return run_command(lambda: _examine(args))


def _examine(args: argparse.Namespace) -> int:
    own = dict(os.environ)
    prepare_environment()
    if not Path(args.hostfile).is_file():
        raise UserError(f"--hostfile {args.hostfile}: there is no such file.")
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
