"""A host's ranks: signals reach all at once, ranks that save are waited for, the others of a failed one end."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from ptp_ds.launch import node
from ptp_ds.launch.node import Host
from tests.support.drill import wait_until

SLEEP = "import time; print('ready', flush=True); time.sleep(60)"
SAVES = (
    "import signal, sys, time\n"
    "def save(number, frame):\n"
    "    time.sleep(0.5)\n    open(sys.argv[1], 'w').write('saved')\n    sys.exit(128 + number)\n"
    "for number in (2, 10, 15): signal.signal(number, save)\n"
    "print('ready', flush=True)\nwhile True: time.sleep(1)\n"
)


@pytest.fixture
def host():
    """A Host; what is left of its ranks is killed."""
    started = Host()
    yield started
    for process in started.ranks.values():
        process.kill()
        process.wait()


def spawn(host: Host, rank: int, code: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-S", "-c", code, *map(str, args)]
    process = host.spawn(command, {**os.environ, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_all_ranks_get_a_signal_and_nobody_is_killed_while_saving(host, tmp_path, number):
    ranks = [spawn(host, rank, SAVES, tmp_path / str(rank)) for rank in range(2)]
    host.pass_on(number)
    wait_until("the first rank's end", lambda: ranks[0].poll() is not None, 10)
    host.end_ranks()  # as DeepSpeed's loop does when it sees an exit code other than 0
    assert [rank.wait(10) for rank in ranks] == [128 + number] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_second_ctrl_c_kills_and_an_echo_does_not(host, monkeypatch):
    clock = [100.0]
    rank = spawn(host, 0, "import signal; signal.signal(2, lambda *a: None);" + SLEEP)
    monkeypatch.setattr(node, "time", type("Clock", (), {"monotonic": staticmethod(lambda: clock[0])}))
    for seconds in (0, 1, 1):
        clock[0] += seconds
        host.pass_on(signal.SIGINT)
    time.sleep(0.2)
    assert rank.poll() is None
    clock[0] += 2
    host.pass_on(signal.SIGINT)
    assert rank.wait(10) == -signal.SIGKILL


def test_a_failed_rank_is_named_and_the_others_end_even_stopped_ones(host, capfd):
    ranks = [spawn(host, rank, SLEEP) for rank in (4, 5, 6)]
    ranks[2].send_signal(signal.SIGSTOP)
    ranks[1].kill()
    ranks[1].wait()
    begun = time.monotonic()
    host.end_ranks()
    assert [rank.wait(5) for rank in ranks] == [-signal.SIGTERM, -signal.SIGKILL, -signal.SIGTERM]
    assert time.monotonic() - begun < 10
    told = capfd.readouterr().err
    assert told.startswith("error: rank 5 on ")
    assert "was killed by SIGKILL, by hand or by the system for lack of memory; this host's others end now" in told
    host.end_ranks()  # DeepSpeed calls it once for each rank
    assert capfd.readouterr().err == ""


def test_a_rank_that_ignores_sigterm_is_killed(host, monkeypatch):
    monkeypatch.setattr(node, "GRACE_SECONDS", 0.5)
    deaf = spawn(host, 0, "import signal; signal.signal(15, signal.SIG_IGN);" + SLEEP)
    host.end_ranks()
    assert deaf.wait(5) == -signal.SIGKILL


def test_no_rank_starts_after_a_signal(host):
    first = spawn(host, 0, SLEEP)
    host.pass_on(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        spawn(host, 1, SLEEP)
    assert stopped.value.code == 143
    assert first.wait(5) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("slots", "own", "seen"),
    [("0,1", None, "0,1"), ("0,1", "2,3", "2,3"), ("1", "2,3", "3"), ("0,2", "7, 5,3,1", "7,3"),
     ("0", "GPU-5b1c,GPU-77aa", "GPU-5b1c"), ("0,1", "", ""), ("0,1", "-1", "-1"), ("0", "4,-1,5", "4"),
     ("1", "1", "1")],
)  # fmt: skip
def test_a_slot_is_a_place_in_the_users_own_list(slots, own, seen):
    assert node.visible_gpus(slots, own) == seen


@pytest.mark.parametrize(("slots", "own", "count"), [("0,1", "3", 1), ("0,2", "4,5", 2), ("1", "4,-1,5", 1)])
def test_a_slot_beyond_the_users_list_is_refused_where_there_are_gpus(slots, own, count, monkeypatch):
    monkeypatch.setattr(node, "has_gpu", lambda: False)
    assert node.visible_gpus(slots, own) == slots, "without a GPU the list means nothing"
    monkeypatch.setattr(node, "has_gpu", lambda: True)
    told = f"CUDA_VISIBLE_DEVICES={own} names {count} GPU(s), and the launcher was given the slots {slots}, "
    with pytest.raises(ValueError, match=re.escape(told)):
        node.visible_gpus(slots, own)


def test_a_rank_sees_the_users_own_gpus(host, monkeypatch):
    """DeepSpeed hands each rank the host's slots as CUDA_VISIBLE_DEVICES."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    command = [sys.executable, "-S", "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"]
    rank = host.spawn(command, {"RANK": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, stdout=subprocess.PIPE, text=True)
    assert rank.communicate(timeout=20)[0] == "5,3\n"


def test_a_reader_that_goes_away_is_noticed(tmp_path):
    """As ssh's end of the output does when a launcher's host is gone."""
    code = "import os, sys, time\nfrom ptp_ds.launch.node import launcher_is_gone\nparent = os.getppid()\n" \
           "with open(sys.argv[1], 'a', buffering=1) as file:\n" \
           "    for _ in range(600):\n        gone = launcher_is_gone(parent)\n        file.write(f'{gone}\\n')\n" \
           "        if gone: break\n        time.sleep(0.05)\n"  # fmt: skip
    seen = tmp_path / "seen"
    process = subprocess.Popen([sys.executable, "-c", code, str(seen)], stdout=subprocess.PIPE)
    wait_until("a first look", lambda: seen.is_file() and "False" in seen.read_text(), 30)
    process.stdout.close()
    assert process.wait(10) == 0
    assert seen.read_text().endswith("True\n")
