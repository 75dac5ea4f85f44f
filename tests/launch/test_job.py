"""A job on several hosts as it runs: the child's exit code, signals to the ranks, ranks that a failed host leaves."""

import os
import signal
import time
from queue import SimpleQueue

import pytest

from ptp_ds.hosts.remote import HostError
from ptp_ds.launch import job as job_module
from ptp_ds.launch.job import run_job, tell_ranks
from ptp_ds.launch.job_plan import Job
from ptp_ds.launch.restarts import should_restart
from ptp_ds.ranks.faults import STOP_SIGNALS
from tests.support.two_hosts import TwoHosts, why_not

JOB = Job(["node1", "node2"], "10.0.0.1", 4321, {"node1": "eth0", "node2": "eth0"}, {}, [])


@pytest.fixture
def told(monkeypatch):
    """told.calls: signals to ranks so far; told.ranks: how many there are to find."""

    class Told:
        calls: list[int] = []  # noqa: RUF012
        ranks = 4

        def __call__(self, job, number, loud=True):
            self.calls.append(int(number))
            return self.ranks

    one = Told()
    one.calls = []
    monkeypatch.setattr(job_module, "tell_ranks", one)
    return one


@pytest.fixture(autouse=True)
def _signals():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("end", "code"), [(None, 0), (SystemExit(3), 3), (SystemExit("text"), 1), (KeyError("x"), 1)])
def test_the_childs_exit_code_is_the_jobs(told, end, code):
    def launch():
        assert os.getsid(0) == os.getpid()  # out of the terminal's reach
        if end is not None:
            raise end

    told.ranks = 0
    assert run_job(JOB, launch) == code
    assert told.calls == ([] if code == 0 else [signal.SIGTERM])  # after a failure: is anyone left?


def test_a_signal_goes_to_the_ranks_not_to_the_child(told, capfd):
    def launch():
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(1.5)
        os.write(2, b"done in its own time\n")

    assert run_job(JOB, launch) == 0
    assert told.calls == [signal.SIGTERM]
    assert "done in its own time" in capfd.readouterr().err


def test_ranks_that_have_not_started_get_it_later(told):
    """A signal while nothing runs yet is offered again; a launcher that never starts a rank is ended."""
    child = os.fork()
    if child == 0:
        os.setsid()
        time.sleep(60)
    signals: SimpleQueue[int] = SimpleQueue()
    watch = job_module._Watch(JOB, child, signals, SimpleQueue())
    told.ranks = 0
    signals.put(signal.SIGINT)
    watch._serve_signals()
    watch._serve_signals()
    assert told.calls == [signal.SIGINT] * 2
    watch.asked_at -= 61
    time.sleep(0.2)  # for the child's setsid
    watch._serve_signals()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_failed_hosts_peers_are_ended_after_a_while(told, monkeypatch):
    monkeypatch.setattr(job_module, "_GRACE_SECONDS", 0.3)

    def launch():
        os.write(2, b"pdsh@node1: node2: ssh exited with exit code 2\n")
        time.sleep(1.5)
        raise SystemExit(2)

    assert run_job(JOB, launch) == 2
    assert told.calls[:2] == [signal.SIGTERM, signal.SIGKILL]


def test_no_host_has_failed_when_all_were_asked_to_stop(told, monkeypatch):
    monkeypatch.setattr(job_module, "_GRACE_SECONDS", 0.3)

    def launch():
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.5)
        os.write(2, b"pdsh@node1: node2: ssh exited with exit code 143\n")
        time.sleep(1)  # node1 still saves

    assert run_job(JOB, launch) == 0
    assert told.calls == [signal.SIGTERM]


@pytest.mark.parametrize(("cause", "restarted"), [(137, True), (1, True), (2, False)])
@pytest.mark.parametrize("last_words", [pytest.param(0.8, marks=pytest.mark.slow), 0.0])
def test_the_host_that_failed_first_decides_what_the_job_ended_with(told, monkeypatch, cause, restarted, last_words):
    """node1 still loads and is ended by our SIGTERM; pdsh -S then tells the larger code of the two, here node1's."""
    monkeypatch.setattr(job_module, "_GRACE_SECONDS", 0.3)

    def launch():
        os.write(2, b"pdsh@node1: node2: ssh exited with exit code %d\n" % cause)
        time.sleep(last_words)
        os.write(2, b"pdsh@node1: node1: ssh exited with exit code 143\n")
        raise SystemExit(max(cause, 143))

    code = run_job(JOB, launch)
    assert (code, should_restart(code)) == (cause, restarted)


def test_a_stop_of_all_keeps_its_code_whoever_ends_first(told, monkeypatch):
    monkeypatch.setattr(job_module, "_GRACE_SECONDS", 0.3)

    def launch():
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.5)
        os.write(2, b"pdsh@node1: node2: ssh exited with exit code 76\n")
        os.write(2, b"pdsh@node1: node1: ssh exited with exit code 143\n")
        raise SystemExit(143)

    assert run_job(JOB, launch) == 143


def test_a_host_without_an_answer_is_named(monkeypatch, capfd):
    replies = {"node1": {"ranks": 2}, "node2": HostError("ssh", "node2 can't be reached")}
    monkeypatch.setattr(job_module, "ask_all", lambda *words, **more: replies)
    assert tell_ranks(JOB, signal.SIGTERM) == 2
    assert "launcher: node2 may still hold ranks of this job: node2 can't be reached" in capfd.readouterr().err
    assert tell_ranks(JOB, 0, loud=False) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_host_that_fails_before_the_ranks_meet_does_not_hold_up_the_others(tiny_model, tmp_path):
    """host2 lacks the model, and its rank leaves; host1's would wait for it for half an hour."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    empty = tmp_path / "empty"
    empty.mkdir()
    with TwoHosts(tmp_path / "two") as hosts:
        hosts.replace("host2", tiny_model, empty)
        words = ["--model", tiny_model, "--task", "COPA", "--output_dir", tmp_path / "out"]
        done = hosts.run(["deepspeed", "--hostfile", hosts.hostfile, "scripts/train.py", *words])
        assert "the folder holds no config.json" in done.stderr
        assert done.returncode not in (0, None)
        assert [hosts.processes(host, "train.py") for host in ("host1", "host2")] == [[], []]
