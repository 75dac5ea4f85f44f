"""A job on several hosts before its start: hosts, master address, port and interface, or one sentence."""

from pathlib import Path

import pytest

from ptp_ds.hosts.probe import JOB_VARIABLE
from ptp_ds.hosts.remote import HostError
from ptp_ds.launch import job_plan
from ptp_ds.launch.job_plan import plan_job, write_environment
from tests.support.routes import route

pytestmark = pytest.mark.usefixtures("no_environment_files")


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
