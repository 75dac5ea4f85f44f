"""A run on several hosts: its master address and port, its network interfaces, the environment that all hosts share.

The launcher decides the first and the last (`plan_job`), over ssh and before anything starts. The interface is found
anew by every rank (`choose_interface`), since its name may differ from host to host; that serves torchrun, srun and
mpirun as well, which come without the launcher.
"""

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from ptp_ds.host_probe import JOB_VARIABLE, interface_addresses, is_loopback, route_to
from ptp_ds.remote import HostError, ask, ask_all

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_SHARED = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE",
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PTP_DS_CACHE",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "TORCH_EXTENSIONS_DIR",
    "TRANSFORMERS_OFFLINE", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "XDG_CACHE_HOME",
)  # fmt: skip
_SHARED_PREFIXES = ("NCCL_", "MALLOC_")
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


def active_slots(args: Any) -> dict[str, list[int]]:
    """The hosts, and each one's slots, that DeepSpeed's arguments leave of their hostfile.

    Raises ValueError for a malformed one and for filters that leave nothing.
    """
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, fetch_hostfile, parse_inclusion_exclusion

    pool = fetch_hostfile(args.hostfile)
    active = parse_inclusion_exclusion(pool, args.include, args.exclude)
    if args.num_nodes > len(active):
        raise ValueError(f"--num_nodes {args.num_nodes}: {args.hostfile} names {len(active)} host(s).")
    slots = apply_num_nodes_and_gpus(active, args.num_nodes, args.num_gpus)
    if not slots:
        raise ValueError(f"--include and --exclude leave no host of {args.hostfile}.")
    return dict(slots)


def shared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that all hosts get: a known list, then the user's .deepspeed_env; never tokens and keys.

    DeepSpeed writes them into a shell command between double quotes, so values that a shell would change are refused.
    """
    shared = {
        name: value
        for name, value in sorted(environment.items())
        if name in _SHARED or name.startswith(_SHARED_PREFIXES)
    }
    for file in _environment_files(environment):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.strip() and "=" not in line:
                raise ValueError(f"{file}: {line.strip()!r} isn't of the form NAME=value.")
            if line.strip():
                name, value = line.split("=", 1)
                shared[name.strip()] = value.strip()
    for name, value in shared.items():
        if re.search(r'["$`\\\n]', value):
            raise ValueError(
                f"{name} holds one of \" $ ` \\ or a line break, which DeepSpeed can't hand to other hosts; set it "
                "there (in ~/.bashrc, say) and unset it here."
            )
    return shared


def _environment_files(environment: Mapping[str, str]) -> list[Path]:
    """DeepSpeed's: $DS_ENV_FILE or .deepspeed_env, in the home folder and in this one."""
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    places = dict.fromkeys((Path.home() / name, Path.cwd() / name))
    return [file for file in places if file.is_file()]


def _master(hosts: Sequence[str], args: Any, wanted: int | None) -> tuple[str, int]:
    """The first host's address and a port of it: what the user gave, checked, or what the host's routing says."""
    first, others = hosts[0], {name: name for name in hosts[1:]}
    given = {"given": args.master_addr} if args.master_addr else {}
    reply = ask(first, {"peers": given or others, "port": wanted}, args.ssh_port)
    if reply["port"] is None:
        raise ValueError(f"--master_port {wanted} of {first} is taken; give another one, or none to have one found.")
    if given:
        held = [address for addresses in reply["interfaces"].values() for address in addresses]
        address = reply["routes"]["given"].get("address")
        if address not in held or (is_loopback(address) and others):
            raise ValueError(f"--master_addr {args.master_addr} isn't an address by which others reach {first}.")
        return address, reply["port"]
    return master_address(first, reply["routes"]), reply["port"]


def master_address(first: str, routes: Mapping[str, Mapping[str, Any]]) -> str:
    """The one address from which the first host reaches all others. Raises ValueError where there isn't one."""
    by_source: dict[str, list[str]] = {}
    for name, route in routes.items():
        if "error" in route:
            raise ValueError(
                f"{first} finds no way to {name} ({route['error']}); make the hostfile's names known on it (DNS, "
                "/etc/hosts), or give --master_addr."
            )
        if is_loopback(route["address"]):
            raise ValueError(f"{first} takes {name} for itself ({route['address']}); correct its /etc/hosts.")
        by_source.setdefault(route["source"], []).append(name)
    if len(by_source) > 1:
        listed = "; ".join(f"{source} for {', '.join(names)}" for source, names in by_source.items())
        raise ValueError(f"{first} reaches the others from several addresses ({listed}); choose one: --master_addr.")
    return next(iter(by_source), "127.0.0.1")  # no others: all ranks are on the first host


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


def interface_of(
    host: str, master_addr: str, route: Mapping[str, Any], interfaces: Mapping[str, Any], environment: Mapping[str, str]
) -> str:
    """The interface of a host: the user's, where it exists, or the one on the way to the master address.

    Raises ValueError where there is none, or several.
    """
    there = ", ".join(sorted(interfaces))
    for variable in INTERFACE_VARIABLES:
        given = environment.get(variable, "")
        names = [name.lstrip("=").split(":")[0] for name in given.split(",") if name and not given.startswith("^")]
        by_prefix = variable.startswith("NCCL") and not given.startswith("=")
        for name in names:
            if not any(found == name or (by_prefix and found.startswith(name)) for found in interfaces):
                raise ValueError(f"{variable}={given} names no network interface of {host}, which has {there}.")
    if environment.get("GLOO_SOCKET_IFNAME"):
        return environment["GLOO_SOCKET_IFNAME"]
    if "error" in route:
        raise ValueError(f"{host} finds no way to the master address {master_addr} ({route['error']}).")
    if len(route["interfaces"]) != 1:
        found = ", ".join(route["interfaces"]) or "none"
        raise ValueError(
            f"{host} reaches {master_addr} from {route['source']}, which is an address of several network interfaces "
            f"or of none ({found}); set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the right one of {there}."
        )
    return route["interfaces"][0]


def choose_interface(environment: MutableMapping[str, str]) -> None:
    """Sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for a rank of several hosts, from MASTER_ADDR; keeps those set.

    Without them gloo takes the address of this host's name, often 127.0.1.1, and NCCL the first interface it likes.
    Raises ValueError where the interface can't be told.
    """
    master, world = environment.get("MASTER_ADDR", ""), int(environment.get("WORLD_SIZE", "1"))
    here = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 0)  # 0: nobody has said
    if not master or world == 1 or here >= world:
        return
    try:
        route = route_to(master)
    except OSError as error:
        route = {"error": str(error)}
    if is_loopback(route.get("address", "")):
        if not here:
            return
        raise ValueError(
            f"MASTER_ADDR={master} is {route['address']} on {os.uname().nodename}, an address that no other host "
            "reaches; give an address of the first host's network."
        )
    found = interface_of(os.uname().nodename, master, route, interface_addresses(), environment)
    environment.setdefault("GLOO_SOCKET_IFNAME", found)
    environment.setdefault("NCCL_SOCKET_IFNAME", f"={found}")  # "=": this name, not all that begin with it


def adopt_mpi(environment: MutableMapping[str, str]) -> None:
    """RANK and its like from Open MPI's variables, where mpirun started this process and nobody set them."""
    if "RANK" in environment or "OMPI_COMM_WORLD_RANK" not in environment:
        return
    names = {"RANK": "RANK", "WORLD_SIZE": "SIZE", "LOCAL_RANK": "LOCAL_RANK", "LOCAL_WORLD_SIZE": "LOCAL_SIZE"}
    for name, theirs in names.items():
        environment[name] = environment[f"OMPI_COMM_WORLD_{theirs}"]


def write_environment(job: Job, file: Path) -> None:
    """The job's variables as DeepSpeed reads them (DS_ENV_FILE)."""
    file.write_text("".join(f"{name}={value}\n" for name, value in job.environment.items()), encoding="utf-8")
