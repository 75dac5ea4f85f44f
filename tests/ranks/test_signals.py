"""A stop signal: noted once, agreed by all ranks, its echo ignored, a second Ctrl-C at once."""

import os
import signal

import pytest
import torch

from ptp_ds.ranks import signals
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import STOP_SIGNALS
from ptp_ds.ranks.signals import StopRequest

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def stop():
    request = StopRequest(ALONE)
    yield request
    request.restore()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_first_one_counts(stop, number):
    assert stop.agreed() == 0
    os.kill(os.getpid(), number)
    assert stop.agreed() == number
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed() == number


def test_an_echo_of_ctrl_c_is_not_a_second_one(stop, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    for seconds in (0.0, 0.5, 2.4):  # the terminal's, the launcher's, the host's
        clock[0] += seconds
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.agreed() == signal.SIGINT
    clock[0] += 0.2
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_still_saves(stop, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # Slurm's, then a person's
        os.kill(os.getpid(), number)
        clock[0] += 60
    assert stop.agreed() == signal.SIGUSR1


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    request = StopRequest(ALONE)
    assert [signal.getsignal(number) for number in STOP_SIGNALS] != before
    request.restore()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
