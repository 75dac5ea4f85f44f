"""Several hosts: master address, port, interface and shared environment, found or refused in one sentence."""

from pathlib import Path

import pytest

from ptp_ds.hosts import network
from ptp_ds.hosts.environment import adopt_mpi, shared_environment
from ptp_ds.hosts.network import choose_interface, interface_of, master_address
from ptp_ds.hosts.probe import JOB_VARIABLE
from ptp_ds.hosts.remote import HostError
from ptp_ds.launch import job_plan
from ptp_ds.launch.job_plan import plan_job, write_environment

LINKS = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.1"], "eth1": ["192.168.0.1"]}


def route(source: str, *interfaces: str, address: str = "10.0.0.9") -> dict:
    return {"address": address, "source": source, "interfaces": list(interfaces)}


@pytest.fixture(autouse=True)
def _no_environment_files(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_only_known_variables_are_shared():
    user = {"HF_TOKEN": "hf_secret", "MY_PASSWORD": "x", "HF_HOME": "/data/hf", "NCCL_DEBUG": "INFO", "RANK": "3"}
    assert shared_environment(user) == {"HF_HOME": "/data/hf", "NCCL_DEBUG": "INFO"}


def test_the_users_own_environment_file_wins(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/other\n\nMINE=a=b\n", encoding="utf-8")
    assert shared_environment({"HF_HOME": "/data/hf"}) == {"HF_HOME": "/other", "MINE": "a=b"}
    (tmp_path / "named").write_text("MINE=2\n", encoding="utf-8")
    assert shared_environment({"DS_ENV_FILE": "named"}) == {"MINE": "2"}


def test_a_malformed_environment_file_is_refused(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("export HF_HOME\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'export HF_HOME' isn't of the form NAME=value"):
        shared_environment({})


@pytest.mark.parametrize("value", ["$(id)", "`id`", 'a"b', "a\\b", "a\nb"])
def test_values_that_a_shell_would_change_are_refused(value):
    with pytest.raises(ValueError, match="HF_HOME holds one of"):
        shared_environment({"HF_HOME": value})


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


def test_mpis_variables_are_adopted_and_a_launchers_kept():
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
    adopted = dict(mpi)
    adopt_mpi(adopted)
    assert [adopted[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["3", "4", "1", "2"]
    kept = {**mpi, "RANK": "0"}
    adopt_mpi(kept)
    assert kept == {**mpi, "RANK": "0"}


class Cluster:
    """Stands in for ssh: node1 to node3, one network; what was asked."""

    def __init__(self) -> None:
        self.taken: set[int] = set()
        self.unreachable: set[str] = set()
        self.asked: list[str] = []

    def ask(self, host, request, port=None, timeout=60, exports=None):
        self.asked.append(host)
        if host in self.unreachable:
            raise HostError("ssh", f"{host} can't be reached")
        own = f"10.0.0.{host[-1]}"
        free = None if request.get("port") in self.taken else request.get("port") or 4321
        routes = {name: route(own, "eth0", address=peer.replace("node", "10.0.0."))
                  for name, peer in request["peers"].items()}  # fmt: skip
        return {"routes": routes, "interfaces": {"lo": ["127.0.0.1"], "eth0": [own]}, "port": free}

    def ask_all(self, names, requests, port=None, timeout=60, exports=None):
        def one(host):
            try:
                return self.ask(host, requests[host])
            except HostError as error:
                return error

        return {host: one(host) for host in names}


@pytest.fixture
def cluster(monkeypatch):
    stand_in = Cluster()
    monkeypatch.setattr(job_plan, "ask", stand_in.ask)
    monkeypatch.setattr(job_plan, "ask_all", stand_in.ask_all)
    return stand_in


def hostfile(folder: Path, *names: str) -> str:
    file = folder / "hosts"
    file.write_text("".join(f"{name} slots=8\n" for name in names), encoding="utf-8")
    return str(file)


def test_a_job_on_several_hosts(cluster, tmp_path):
    file = hostfile(tmp_path, "node1", "node2", "node3")
    job = plan_job(["--hostfile", file, "train.py", "--seed", "1"], {"HF_HOME": "/hf", "A": "1"}, ["here"])
    assert job.flags == ["--no_ssh_check", "--master_addr", "10.0.0.1", "--master_port", "4321"]
    assert job.environment == {"HF_HOME": "/hf", JOB_VARIABLE: job.key}
    assert job.describe() == "3 host(s), master node1 at 10.0.0.1:4321, over eth0; sent to all hosts: HF_HOME"
    assert cluster.asked == ["node1", "node1", "node2", "node3"]
    write_environment(job, tmp_path / "environment")
    assert (tmp_path / "environment").read_text() == f"HF_HOME=/hf\n{JOB_VARIABLE}={job.key}\n"


@pytest.mark.usefixtures("cluster")
def test_what_a_user_gives_is_kept(tmp_path):
    file = hostfile(tmp_path, "node1", "node2")
    given = ["--hostfile", file, "--master_port", "29500", "--master_addr=10.0.0.1", "train.py"]
    job = plan_job(given, {}, [])
    assert (job.flags, job.master_addr, job.master_port) == (["--no_ssh_check"], "10.0.0.1", 29500)


def test_one_other_host_is_not_this_one(cluster, tmp_path):
    job = plan_job(["--hostfile", hostfile(tmp_path, "node7"), "train.py"], {}, ["here"])
    assert job.flags[-1] == "--force_multi"
    assert job.master_addr == "127.0.0.1"
    assert cluster.asked == ["node7", "node7"]


def test_filters_choose_the_hosts(cluster, tmp_path):
    file = hostfile(tmp_path, "node1", "node2", "node3")
    assert plan_job(["-H", file, "--exclude", "node1", "train.py"], {}, []).hosts == ["node2", "node3"]
    assert plan_job(["-H", file, "--num_nodes", "2", "train.py"], {}, []).hosts == ["node1", "node2"]
    with pytest.raises(ValueError, match=r"--num_nodes 4: .* names 3 host\(s\)"):
        plan_job(["-H", file, "--num_nodes", "4", "train.py"], {}, [])


@pytest.mark.parametrize("words", [["--launcher", "slurm"], ["--no_ssh", "--node_rank", "0"]])
def test_other_launchers_are_left_alone(cluster, tmp_path, words):
    assert plan_job(["--hostfile", hostfile(tmp_path, "node1", "node2"), *words, "train.py"], {}, []) is None
    assert plan_job(["--hostfile", str(tmp_path / "none"), "train.py"], {}, []) is None
    assert plan_job(["--hostfile", hostfile(tmp_path, "here"), "train.py"], {}, ["here"]) is None
    assert cluster.asked == []


def test_faults_before_the_start(cluster, tmp_path):
    file = hostfile(tmp_path, "node1", "node2")
    cluster.taken = {29500}
    with pytest.raises(ValueError, match="--master_port 29500 of node1 is taken"):
        plan_job(["--hostfile", file, "--master_port", "29500", "train.py"], {}, [])
    with pytest.raises(ValueError, match="--master_addr node2 isn't an address by which others reach node1"):
        plan_job(["--hostfile", file, "--master_addr", "node2", "train.py"], {}, [])
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=ib0 names no network interface of node1"):
        plan_job(["--hostfile", file, "train.py"], {"GLOO_SOCKET_IFNAME": "ib0"}, [])
    cluster.unreachable = {"node2"}
    with pytest.raises(ValueError, match="node2 can't be reached"):
        plan_job(["--hostfile", file, "train.py"], {}, [])
