"""Before a run on several hosts: are they there, alike, and able to talk? One table, a sentence a fault.

Each host is asked twice over plain ssh (ptp_ds.hosts.probe): first about itself, then to reach all the others at once.
Where nothing is wrong by then, DeepSpeed's own command starts a timed all-reduce and all-gather over all ranks.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from uuid import uuid4

from ptp_ds.errors import UserError
from ptp_ds.hosts.network import interface_of, master_address
from ptp_ds.hosts.remote import HostError, ask_all
from ptp_ds.launch.doctor_report import Fault, Seen, connection_faults
from ptp_ds.ranks import collectives
from ptp_ds.ranks.log import get_logger

log = get_logger(__name__)

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "safetensors", "psutil")
_MEETING_SECONDS = 15.0
_COLLECTIVE_SECONDS = 300


def examine(
    args: argparse.Namespace, hosts: Sequence[str], shared: Mapping[str, str]
) -> tuple[dict[str, Seen], list[Fault]]:
    """What was seen of each host that answered, and the faults of those that didn't, or of the ways between them."""
    here = {"localhost", "127.0.0.1", "::1", socket.gethostname()}
    local = len(hosts) == 1 and hosts[0] in here
    path = ":".join(part for part in (os.getcwd(), os.environ.get("PYTHONPATH", "")) if part)
    exports = {**shared, "PYTHONPATH": path}  # as DeepSpeed sets it
    asked = {
        "packages": PACKAGES, "model": args.model, "full_hash": args.full_hash, "output_dir": args.output_dir,
        "folder": os.getcwd(),
    }  # fmt: skip
    others = {host: host for host in hosts[1:]}
    requests = {host: {"report": asked, "peers": others if host == hosts[0] else {}, "port": 0} for host in hosts}
    replies = ask_all(hosts, requests, args.ssh_port, 3600 if args.full_hash else 600, exports, local)
    seen, faults = {}, []
    for host, reply in replies.items():
        if isinstance(reply, HostError):
            faults.append(Fault(host, reply.kind, str(reply), ""))
        else:
            seen[host] = Seen(reply, reply["time"] - reply["received"])
    if len(hosts) == 1 or hosts[0] not in seen:
        return seen, faults
    return seen, [*faults, *_meet(args, hosts, seen, shared, exports)]


def _meet(
    args: argparse.Namespace, hosts: Sequence[str], seen: dict[str, Seen], shared: Mapping[str, str],
    exports: Mapping[str, str],
) -> list[Fault]:  # fmt: skip
    """The second question: every host's interface on the way to the first, and TCP connections between all."""
    first, present = hosts[0], [host for host in hosts if host in seen]
    routes = {name: route for name, route in seen[first].reply["routes"].items() if name in seen}
    try:
        master = master_address(first, routes)
    except UserError as error:
        return [Fault(first, "interface", str(error), "")]
    if len(present) < 2:
        return []
    key, places = uuid4().hex, {host: seen[host].reply["port"] for host in present}
    requests = {}
    for host in present:
        peers = {other: [master if other == first else other, places[other]] for other in present if other != host}
        requests[host] = {"peers": {"master": master}, "connect": [key, host, places[host], peers, _MEETING_SECONDS]}
    replies = ask_all(present, requests, args.ssh_port, 4 * _MEETING_SECONDS, exports)
    faults = []
    for host, reply in replies.items():
        if isinstance(reply, HostError):
            faults.append(Fault(host, reply.kind, str(reply), ""))
            continue
        try:
            seen[host].interface = interface_of(host, master, reply["routes"]["master"], reply["interfaces"], shared)
        except UserError as error:
            faults.append(Fault(host, "interface", str(error), ""))
    unconnected = {host: reply["unconnected"] for host, reply in replies.items() if not isinstance(reply, HostError)}
    return [*faults, *connection_faults(unconnected)]


def run_collectives(args: argparse.Namespace, ranks: int) -> list[Fault]:
    """Starts the timed collectives as a run is started and prints what they took; a fault where they fail."""
    words = ["--hostfile", args.hostfile]
    for name in ("include", "exclude", "num_nodes", "num_gpus", "ssh_port"):
        value = getattr(args, name)
        if value not in ("", -1, None):
            words += [f"--{name}", str(value)]
    module = ["--module", "ptp_ds.ranks.collectives", "--mebibytes", str(args.mebibytes)]
    command = [sys.executable, "-m", "ptp_ds.launch", *words, *module]
    remedy = "NCCL_DEBUG=INFO or TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment says more."
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        try:
            printed, _ = run.communicate(timeout=_COLLECTIVE_SECONDS)
        except subprocess.TimeoutExpired:
            run.terminate()  # the launcher ends the ranks
            run.communicate()
            sentence = f"The collectives over {ranks} ranks weren't done after {_COLLECTIVE_SECONDS} seconds."
            return [Fault("", "collectives", sentence, remedy)]
    for line in printed.splitlines():
        if collectives.MARK in line:
            log.info("%s", describe_collectives(json.loads(line.split(collectives.MARK, 1)[1])))
            return []
    last = [line for line in printed.splitlines() if "rror" in line][-1:] or printed.splitlines()[-1:]
    sentence = f"The collectives over {ranks} ranks failed with exit code {run.returncode} ({''.join(last).strip()})."
    return [Fault("", "collectives", sentence, remedy)]


def describe_collectives(found: Mapping[str, float]) -> str:
    """One line: seconds, and the bytes a second that each rank sent, at 2 (n-1)/n and (n-1)/n of the size."""
    share = (found["world"] - 1) / found["world"] * found["mebibytes"] / 1024
    reduce, gather = found["all_reduce"], found["all_gather"]
    return (
        f"{found['mebibytes']} MiB over {found['world']} rank(s): all-reduce {reduce:.4f} s "
        f"({2 * share / reduce:.2f} GiB/s a rank), all-gather {gather:.4f} s ({share / gather:.2f} GiB/s a rank)"
    )
