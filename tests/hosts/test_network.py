"""Several hosts: master address and interface, found or refused in one sentence."""

import pytest

from ptp_ds.hosts import network
from ptp_ds.hosts.network import choose_interface, interface_of, master_address
from tests.support.routes import route

LINKS = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "eth1": ["192.168.0.1"]}


def test_the_master_address_is_where_the_others_are_reached_from():
    assert master_address("a", {"b": route("10.0.0.1", "eth0"), "c": route("10.0.0.1", "eth0")}) == "10.0.0.1"
    assert master_address("a", {}) == "127.0.0.1"


@pytest.mark.parametrize(
    ("routes", "sentence"),
    [
        ({"b": route("10.0.0.1"), "c": route("192.168.0.1")}, r"several addresses \(10.0.0.1 for b; 192.168.0.1 for c"),
        ({"b": route("127.0.0.1", "lo", address="127.0.1.1")}, r"takes b for itself \(127.0.1.1\)"),
        ({"b": {"error": "Name or service not known"}}, r"finds no way to b \(Name or service not known\)"),
    ],
)
def test_no_master_address_is_guessed(routes, sentence):
    with pytest.raises(ValueError, match=sentence):
        master_address("a", routes)


def test_the_interface_is_the_one_on_the_way():
    assert interface_of("a", "10.0.0.9", route("10.0.0.1", "eth0"), LINKS, {}) == "eth0"
    assert interface_of("a", "10.0.0.9", route("10.0.0.1", "eth0"), LINKS, {"NCCL_SOCKET_IFNAME": "eth"}) == "eth0"
    assert interface_of("a", "10.0.0.9", {"error": "x"}, LINKS, {"GLOO_SOCKET_IFNAME": "eth1"}) == "eth1"


@pytest.mark.parametrize(
    ("found", "environment", "sentence"),
    [
        (route("10.0.0.1", "br0", "eth0"), {}, r"several network interfaces or of none \(br0, eth0\)"),
        (route("10.0.0.1"), {}, r"or of none \(none\); set GLOO_SOCKET_IFNAME"),
        ({"error": "Network is unreachable"}, {}, "a finds no way to the master address 10.0.0.9"),
        (route("10.0.0.1", "eth0"), {"GLOO_SOCKET_IFNAME": "eth9"}, "GLOO_SOCKET_IFNAME=eth9 names no network inter"),
        (route("10.0.0.1", "eth0"), {"GLOO_SOCKET_IFNAME": "eth"}, "which has eth0, eth1, lo"),
        (route("10.0.0.1", "eth0"), {"NCCL_SOCKET_IFNAME": "=eth"}, "NCCL_SOCKET_IFNAME==eth names no network"),
    ],
)
def test_no_interface_is_guessed(found, environment, sentence):
    with pytest.raises(ValueError, match=sentence):
        interface_of("a", "10.0.0.9", found, LINKS, environment)


@pytest.fixture
def _on_eth0(monkeypatch):
    monkeypatch.setattr(network, "route_to", lambda peer: route("10.0.0.1", "eth0"))
    monkeypatch.setattr(network, "interface_addresses", lambda: LINKS)


@pytest.mark.usefixtures("_on_eth0")
def test_a_rank_of_several_hosts_finds_its_interface():
    rank = {"MASTER_ADDR": "node1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    choose_interface(rank)
    assert (rank["GLOO_SOCKET_IFNAME"], rank["NCCL_SOCKET_IFNAME"]) == ("eth0", "=eth0")
    given = {"MASTER_ADDR": "node1", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "GLOO_SOCKET_IFNAME": "eth1"}
    choose_interface(given)
    assert (given["GLOO_SOCKET_IFNAME"], given["NCCL_SOCKET_IFNAME"]) == ("eth1", "=eth1")


@pytest.mark.usefixtures("_on_eth0")
@pytest.mark.parametrize(
    "rank",
    [
        {},
        {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"},
        {"MASTER_ADDR": "node1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
    ],
)
def test_one_host_needs_no_interface(rank):
    before = dict(rank)
    choose_interface(rank)
    assert rank == before


def test_a_loopback_master_of_several_hosts_is_refused(monkeypatch):
    monkeypatch.setattr(network, "route_to", lambda peer: route("127.0.0.1", "lo", address="127.0.1.1"))
    with pytest.raises(ValueError, match=r"MASTER_ADDR=node1 is 127.0.1.1 on .* that no other host reaches"):
        choose_interface({"MASTER_ADDR": "node1", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"})
