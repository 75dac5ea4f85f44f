"""Addresses and network interfaces: the master's address, and each host's interface on the way to it.

The launcher decides the first over ssh and before anything starts (ptp_ds.launch.job_plan). The interface is found anew
by every rank (`choose_interface`), since its name may differ from host to host; that serves torchrun, srun and mpirun
as well, which come without the launcher.
"""

import os
from collections.abc import Mapping, MutableMapping
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.hosts.probe import interface_addresses, is_loopback, route_to

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def master_address(first: str, routes: Mapping[str, Mapping[str, Any]]) -> str:
    """The one address from which the first host reaches all others. Raises ValueError where there isn't one."""
    by_source: dict[str, list[str]] = {}
    for name, route in routes.items():
        if "error" in route:
            raise UserError(
                f"{first} finds no way to {name} ({route['error']}); make the hostfile's names known on it (DNS, "
                "/etc/hosts), or give --master_addr."
            )
        if is_loopback(route["address"]):
            raise UserError(f"{first} takes {name} for itself ({route['address']}); correct its /etc/hosts.")
        by_source.setdefault(route["source"], []).append(name)
    if len(by_source) > 1:
        listed = "; ".join(f"{source} for {', '.join(names)}" for source, names in by_source.items())
        raise UserError(f"{first} reaches the others from several addresses ({listed}); choose one: --master_addr.")
    return next(iter(by_source), "127.0.0.1")  # no others: all ranks are on the first host


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
                raise UserError(f"{variable}={given} names no network interface of {host}, which has {there}.")
    if environment.get("GLOO_SOCKET_IFNAME"):
        return environment["GLOO_SOCKET_IFNAME"]
    if "error" in route:
        raise UserError(f"{host} finds no way to the master address {master_addr} ({route['error']}).")
    if len(route["interfaces"]) != 1:
        found = ", ".join(route["interfaces"]) or "none"
        raise UserError(
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
        raise UserError(
            f"MASTER_ADDR={master} is {route['address']} on {os.uname().nodename}, an address that no other host "
            "reaches; give an address of the first host's network."
        )
    found = interface_of(os.uname().nodename, master, route, interface_addresses(), environment)
    environment.setdefault("GLOO_SOCKET_IFNAME", found)
    environment.setdefault("NCCL_SOCKET_IFNAME", f"={found}")  # "=": this name, not all that begin with it
