"""The hostfile: which hosts and slots a command line leaves of it, by DeepSpeed's own parser."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.files import is_file, read_text, shipped, shipped_names


def named_hostfile(given: str) -> str:
    """A hostfile's path: as it was given, or the packaged one's of that name, where no such file is here.

    Raises UserError where there is neither: DeepSpeed would run on this machine alone.
    """
    found = given if is_file(given) else shipped("hostfiles", given)
    if found is None:
        known = ", ".join(name for name in shipped_names("hostfiles", "") if "." not in name)
        raise UserError(f"--hostfile {given}: there is no such file; give a path, or a packaged one: {known}.")
    return str(found)


def hosts_of(hostfile: str) -> list[str]:
    """Host names of a hostfile, none where there is no such file."""
    lines = read_text(hostfile, f"--hostfile {hostfile}").splitlines() if is_file(hostfile) else []
    return [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]


@contextmanager
def deepspeed_refusals() -> Iterator[None]:
    """Around DeepSpeed's parser and launcher: what it raises for a hostfile or a flag is the user's error."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{str(error).rstrip('.')}; see `deepspeed --help`.") from error


def active_slots(args: Any) -> dict[str, list[int]]:
    """The hosts, and each one's slots, that DeepSpeed's arguments leave of their hostfile.

    Raises ValueError for a malformed one and for filters that leave nothing.
    """
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, fetch_hostfile, parse_inclusion_exclusion

    with deepspeed_refusals():
        active = parse_inclusion_exclusion(fetch_hostfile(args.hostfile), args.include, args.exclude)
    if args.num_nodes > len(active):
        raise UserError(f"--num_nodes {args.num_nodes}: {args.hostfile} names {len(active)} host(s).")
    slots = apply_num_nodes_and_gpus(active, args.num_nodes, args.num_gpus)
    if not slots:
        raise UserError(f"--include and --exclude leave no host of {args.hostfile}.")
    return dict(slots)
