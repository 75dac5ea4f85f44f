"""What a host says of itself: routes, ports, the ranks of a job."""

import signal
import socket
import subprocess
import sys
import time

import pytest

from ptp_ds.hosts import probe as host_probe
from ptp_ds.hosts.probe import (
    JOB_VARIABLE,
    answer,
    connection_ports,
    is_loopback,
    job_ranks,
    route_to,
    signal_ranks,
    take_port,
)
from tests.support.processes import child_environment


def test_the_route_to_this_host_is_its_loopback():
    assert route_to("127.0.0.1") == {"address": "127.0.0.1", "source": "127.0.0.1", "interfaces": ["lo"]}
    with pytest.raises(OSError, match=r".+"):
        route_to("no-such-host.invalid")
    found = answer({"peers": {"here": "127.0.0.1", "nowhere": "no-such-host.invalid"}})
    assert found["routes"]["here"]["interfaces"] == ["lo"]
    assert set(found["routes"]["nowhere"]) == {"error"}


@pytest.mark.parametrize(("address", "loopback"), [("127.0.1.1", True), ("::1", True), ("10.0.0.1", False)])
def test_loopback(address, loopback):
    assert is_loopback(address) is loopback


def test_a_taken_port_is_told_from_a_free_one():
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        taken = server.getsockname()[1]
        assert take_port(taken) is None
    assert take_port(taken) == taken


def test_any_port_is_one_that_no_connection_is_given(monkeypatch):
    """Between its choice and the ranks' use of it another job's outgoing connection must not take it."""
    first, last = connection_ports()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert first <= client.getsockname()[1] <= last
    found = {take_port(None) for _ in range(50)}
    assert len(found) > 40
    assert not any(first <= port <= last for port in found)
    assert first <= take_port(0) <= last, "what ranks listen at among themselves, which the doctor tries"
    monkeypatch.setattr(host_probe, "connection_ports", lambda: (1024, 65535))
    assert first <= take_port(None) <= last


def test_a_signal_reaches_a_jobs_ranks_and_nothing_else():
    """A rank with a child, a process of the job that is no rank, and a rank of another job."""
    sleep = "import time; time.sleep(60)"
    family = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{sleep}'])"
    started = {
        "rank": (family, {JOB_VARIABLE: "job-a", "RANK": "0"}),
        "launcher": (sleep, {JOB_VARIABLE: "job-a"}),
        "other": (sleep, {JOB_VARIABLE: "job-b", "RANK": "0"}),
    }
    processes = {
        name: subprocess.Popen([sys.executable, "-c", code], env=child_environment(extra))
        for name, (code, extra) in started.items()
    }
    try:
        end = time.monotonic() + 10
        while not (found := job_ranks("job-a")):
            assert time.monotonic() < end
        assert found == [processes["rank"].pid]
        assert signal_ranks("job-a", signal.SIGTERM) == 1
        assert processes["rank"].wait(10) == -signal.SIGTERM
        assert processes["launcher"].poll() is None
        assert processes["other"].poll() is None
        assert signal_ranks("job-c", signal.SIGKILL) == 0
    finally:
        signal_ranks("job-a", signal.SIGKILL)  # the rank's child
        for process in processes.values():
            process.kill()
            process.wait()
