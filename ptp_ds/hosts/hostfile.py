"""The hostfile: which hosts and slots a command line leaves of it, by DeepSpeed's own parser."""

from pathlib import Path
from typing import Any

from ptp_ds.errors import UserError


def hosts_of(hostfile: str) -> list[str]:
    """Host names of a hostfile, none where there is no such file."""
    path = Path(hostfile)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]


def active_slots(args: Any) -> dict[str, list[int]]:
    """The hosts, and each one's slots, that DeepSpeed's arguments leave of their hostfile.

    Raises ValueError for a malformed one and for filters that leave nothing.
    """
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, fetch_hostfile, parse_inclusion_exclusion

    pool = fetch_hostfile(args.hostfile)
    active = parse_inclusion_exclusion(pool, args.include, args.exclude)
    if args.num_nodes > len(active):
        raise UserError(f"--num_nodes {args.num_nodes}: {args.hostfile} names {len(active)} host(s).")
    slots = apply_num_nodes_and_gpus(active, args.num_nodes, args.num_gpus)
    if not slots:
        raise UserError(f"--include and --exclude leave no host of {args.hostfile}.")
    return dict(slots)
