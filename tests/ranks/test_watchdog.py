"""The watchdog: when it ends a process, when not, and what it says."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ptp_ds.ranks import watchdog as module
from ptp_ds.ranks.faults import STALLED
from ptp_ds.ranks.watchdog import Watchdog
from tests.support.drill import wait_until
from tests.support.processes import child_environment


@pytest.fixture
def watch():
    """watch(timeout): a Watchdog and the list of codes that it ended with."""
    started: list[Watchdog] = []

    def begin(timeout: float) -> tuple[Watchdog, list[int]]:
        ended: list[int] = []
        started.append(Watchdog(timeout, 3, ended.append))
        return started[-1], ended

    yield begin
    for one in started:
        one.stop()


def test_it_ends_a_stalled_rank_and_says_what_it_was_in(watch, capfd):
    dog, ended = watch(0.2)
    dog.doing("optimizer step 7")
    wait_until("the end", lambda: bool(ended), 10)
    assert ended == [STALLED]
    text = capfd.readouterr().err
    assert text.startswith("error on rank 3: nothing has moved for 0 s (--stall_timeout 0.2) in optimizer step 7: ")
    assert "test_it_ends_a_stalled_rank_and_says_what_it_was_in" in text  # the main thread's stack


def test_what_moves_is_not_stalled(watch):
    dog, ended = watch(1.0)
    for number in range(8):
        dog.doing(f"step {number}") if number % 2 == 0 else dog.beat()
        time.sleep(0.2)
    assert ended == []
    wait_until("the end", lambda: bool(ended), 10)


def test_nothing_is_watched_before_the_first_step_or_without_a_limit(watch):
    _, early = watch(0.1)
    unlimited, never = watch(0.0)
    unlimited.doing("a step")
    time.sleep(0.5)
    assert (early, never) == ([], [])


def test_time_asleep_does_not_count(watch, monkeypatch):
    """All of a job suspended and continued: the clock has moved on by an hour between two looks at it."""
    shift = [0.0]
    real = time.monotonic
    monkeypatch.setattr(module.time, "monotonic", lambda: real() + shift[0])
    dog, ended = watch(2.0)
    dog.doing("a step")
    time.sleep(0.7)
    shift[0] = 3600.0
    time.sleep(1.0)
    assert ended == []


def test_a_rank_whose_launcher_died_gets_sigterm(tmp_path):
    """A launcher starts a rank and is killed; the rank notes SIGTERM, which it has a handler for, and ends."""
    rank = (
        "import signal, sys, time\n"
        "from ptp_ds.ranks.watchdog import Watchdog\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w').write('asked'), sys.exit()))\n"
        "dog = Watchdog(0, 0)\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}, sys.argv[1]])"
    noted = tmp_path / "noted"
    env = child_environment({"RANK": "0"})
    process = subprocess.Popen([sys.executable, "-c", launcher, str(noted)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until("SIGTERM", noted.exists, 10)
