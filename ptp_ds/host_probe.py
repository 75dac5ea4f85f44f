"""What a host knows about itself. Imported by ranks, and sent whole over ssh to hosts that may lack this package.

Only the standard library and psutil, which DeepSpeed brings, may be imported here.
"""

import json
import os
import socket
import sys
import time
from typing import Any

MARK = "ptp_ds probe "  # before the answer's line: a login shell may print lines of its own
_MPI_RANK = b"OMPI_COMM_WORLD_RANK"
JOB_VARIABLE = "PTP_DS_JOB"  # in the environment of all processes of one job on several hosts


def interface_addresses() -> dict[str, list[str]]:
    """The addresses (IPv4 and IPv6, no scope) of each network interface."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.split("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def is_loopback(address: str) -> bool:
    """Whether an address never leaves its host."""
    return address.startswith("127.") or address == "::1"


def route_to(peer: str) -> dict[str, Any]:
    """How this host reaches a peer: {"address", "source", "interfaces"}, the interfaces that hold the source address.

    The kernel's routing is asked by connecting a datagram socket, which sends nothing. Raises OSError for an unknown
    name and for a peer without a route.
    """
    family, kind, protocol, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        source = probe.getsockname()[0].split("%")[0]
    names = [name for name, addresses in interface_addresses().items() if source in addresses]
    return {"address": place[0], "source": source, "interfaces": sorted(names)}


def take_port(wanted: int | None) -> int | None:
    """A free TCP port of this host: the wanted one, or any; None where the wanted one is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted or 0))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def job_ranks(job: str) -> list[int]:
    """Process numbers of a job's ranks on this host: those that hold its key and a RANK, and whose parent has none."""
    ranks = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    names = dict(part.split(b"=", 1) for part in file.read().split(b"\0") if b"=" in part)
                with open(f"/proc/{entry}/stat", "rb") as file:
                    parent = int(file.read().rsplit(b")", 1)[1].split()[1])
            except OSError:
                continue  # it has ended, or is another user's
            if names.get(JOB_VARIABLE.encode()) == job.encode() and (b"RANK" in names or _MPI_RANK in names):
                ranks[int(entry)] = parent
    return sorted(number for number, parent in ranks.items() if parent not in ranks)


def signal_ranks(job: str, number: int) -> int:
    """Sends a signal to a job's ranks on this host; returns how many there were."""
    ranks = job_ranks(job)
    for rank in ranks:
        try:
            os.kill(rank, number)
        except ProcessLookupError:
            continue
    return len(ranks)


def _routes(peers: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, peer in peers.items():
        try:
            found[name] = route_to(peer)
        except OSError as error:
            found[name] = {"error": str(error)}
    return found


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request: its keys choose what is asked.

    peers {name: address}: routes to them. port: a free port (0) or whether that one is free. signal [job, number].
    """
    reply: dict[str, Any] = {"host": socket.gethostname()}
    if "peers" in request:
        reply["routes"] = _routes(request["peers"])
        reply["interfaces"] = interface_addresses()
    if "port" in request:
        reply["port"] = take_port(request["port"])
    if "signal" in request:
        reply["ranks"] = signal_ranks(*request["signal"])
    reply["time"] = time.time()
    return reply


if __name__ == "__main__":
    print(MARK + json.dumps(answer(json.loads(sys.argv[1]))), flush=True)
