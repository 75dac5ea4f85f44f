"""What a run on several hosts starts with: master address and port, interfaces, the environment that is sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from ptp_ds.errors import UserError
from ptp_ds.hosts.environment import shared_environment
from ptp_ds.hosts.hostfile import active_slots
from ptp_ds.hosts.network import interface_of, master_address
from ptp_ds.hosts.probe import JOB_VARIABLE, is_loopback
from ptp_ds.hosts.remote import HostError, ask, ask_all

_LAUNCHERS = ("pdsh", "openmpi")  # those that start ranks by ssh and with which this was tried


@dataclass(frozen=True)
class Job:
    """A run on other hosts than this machine alone. interfaces: of each host, on the way to the master address."""

    hosts: Sequence[str]
    master_addr: str
    master_port: int
    interfaces: Mapping[str, str]
    environment: Mapping[str, str]
    flags: Sequence[str]
    ssh_port: int | None = None
    key: str = field(default_factory=lambda: uuid4().hex[:12])

    def describe(self) -> str:
        """The line that says what was chosen."""
        names = sorted(set(self.interfaces.values()))
        over = ", ".join(f"{name} ({', '.join(h for h in self.hosts if self.interfaces[h] == name)})" for name in names)
        sent = [name for name in self.environment if name != JOB_VARIABLE]
        return (
            f"{len(self.hosts)} host(s), master {self.hosts[0]} at {self.master_addr}:{self.master_port}, over "
            f"{names[0] if len(names) == 1 else over}; sent to all hosts: {', '.join(sent) or 'no variables'}"
        )


def plan_job(argv: Sequence[str], environment: Mapping[str, str], local: Sequence[str]) -> Job | None:
    """What a `deepspeed` command line that names other hosts will run with; None for one that needs nothing of it.

    local: names of this machine. environment: the user's own variables, whose values are kept. Raises ValueError where
    a host can't be reached, or where addresses, ports or interfaces can't be told.
    """
    from deepspeed.launcher.runner import parse_args

    args = parse_args(list(argv))
    if not Path(args.hostfile).is_file() or args.no_ssh or args.launcher.lower() not in _LAUNCHERS:
        return None
    hosts = list(active_slots(args))
    if len(hosts) == 1 and hosts[0] in local:
        return None
    shared = shared_environment(environment)
    own = argv[: len(argv) - len(args.user_args)]
    port_given = any(word.startswith("--master_port") for word in own)
    address, port = _master(hosts, args, args.master_port if port_given else None)
    interfaces = _interfaces(hosts, address, shared, args.ssh_port)
    flags = ["--no_ssh_check"]  # done, for all hosts
    flags += [] if args.master_addr else ["--master_addr", address]
    flags += [] if port_given else ["--master_port", str(port)]
    if len(hosts) == 1:
        flags.append("--force_multi")  # DeepSpeed would run a single host's ranks here, whatever the host
    if args.launcher.lower() == "openmpi":  # its ranks learn the rest from mpirun
        shared |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    job = Job(hosts, address, port, interfaces, shared, flags, args.ssh_port)
    shared[JOB_VARIABLE] = job.key
    return job


def _master(hosts: Sequence[str], args: Any, wanted: int | None) -> tuple[str, int]:
    """The first host's address and a port of it: what the user gave, checked, or what the host's routing says."""
    first, others = hosts[0], {name: name for name in hosts[1:]}
    given = {"given": args.master_addr} if args.master_addr else {}
    reply = ask(first, {"peers": given or others, "port": wanted}, args.ssh_port)
    if reply["port"] is None:
        raise UserError(f"--master_port {wanted} of {first} is taken; give another one, or none to have one found.")
    if given:
        held = [address for addresses in reply["interfaces"].values() for address in addresses]
        address = reply["routes"]["given"].get("address")
        if address not in held or (is_loopback(address) and others):
            raise UserError(f"--master_addr {args.master_addr} isn't an address by which others reach {first}.")
        return address, reply["port"]
    return master_address(first, reply["routes"]), reply["port"]


def _interfaces(
    hosts: Sequence[str], master_addr: str, shared: Mapping[str, str], ssh_port: int | None
) -> dict[str, str]:
    replies = ask_all(hosts, {host: {"peers": {"master": master_addr}} for host in hosts}, ssh_port)
    chosen = {}
    for host, reply in replies.items():
        if isinstance(reply, HostError):
            raise reply
        chosen[host] = interface_of(host, master_addr, reply["routes"]["master"], reply["interfaces"], shared)
    return chosen


def write_environment(job: Job, file: Path) -> None:
    """The job's variables as DeepSpeed reads them (DS_ENV_FILE)."""
    file.write_text("".join(f"{name}={value}\n" for name, value in job.environment.items()), encoding="utf-8")
