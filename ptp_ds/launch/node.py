"""What runs on each host in the place of deepspeed.launcher.launch: the same, and nobody is killed while saving.

DeepSpeed's own sends SIGTERM to one rank after the other and SIGKILL 30 seconds later, save or no save; it knows
neither SIGUSR1 nor that its launcher died, and doesn't say which rank failed. Here a signal is handed to all ranks at
once and the ranks end themselves. Only where one has failed, the others get 30 seconds.
"""

import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import psutil

from ptp_ds.errors import UserError
from ptp_ds.launch.quiet import hush_echoes, quiet_flags
from ptp_ds.ranks.faults import STOP_SIGNALS, USER_ERROR, explain_code, is_stop, shell_code
from ptp_ds.ranks.log import ANY_RANK, get_logger, log_to_console
from ptp_ds.ranks.signals import ECHO_SECONDS

log = get_logger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
GRACE_SECONDS = 30.0  # what ranks get to end, once one has failed
LEAVE_SECONDS = 60.0  # what ranks get to leave, once one has left after an agreed stop


class Host:
    """The ranks of this host, by their number."""

    def __init__(self) -> None:
        self.ranks: dict[int, subprocess.Popen] = {}
        self.received = 0
        self._interrupted = 0.0
        self._ended = False

    def spawn(self, command: Sequence[str], env: Mapping[str, str], **more: Any) -> subprocess.Popen:
        """Starts one rank, as subprocess.Popen, on GPUs of the user's own list; none after a stop signal."""
        if self.received:
            self.end_ranks()
            raise SystemExit(128 + self.received)
        if VISIBLE in env:
            env = {**env, VISIBLE: visible_gpus(env[VISIBLE], os.environ.get(VISIBLE))}
        process = subprocess.Popen(command, env=env, **more)
        self.ranks[int(env["RANK"])] = process
        return process

    def living(self) -> list[subprocess.Popen]:
        """Ranks that have not ended."""
        return [process for process in self.ranks.values() if process.poll() is None]

    def pass_on(self, number: int, frame: object = None) -> None:
        """Hands a signal to all ranks; a second Ctrl-C, later than an echo of the first, kills them."""
        self.received = self.received or number
        if number == signal.SIGINT:
            if self._interrupted and time.monotonic() - self._interrupted > ECHO_SECONDS:
                number = signal.SIGKILL
            self._interrupted = self._interrupted or time.monotonic()
        for process in self.living():
            process.send_signal(number)

    def end_ranks(self, pid: int = 0) -> None:
        """Called when a rank has failed or left: says which, then ends the others and what they started."""
        if self._ended:
            return
        self._ended = True
        self.living()  # polls them all: the one that DeepSpeed has found need not be the first
        codes = {rank: shell_code(process.returncode) for rank, process in self.ranks.items() if process.returncode}
        for rank, code in codes.items():
            if not is_stop(code) and code != USER_ERROR:
                log.error(
                    "error: rank %d on %s %s; this host's others end now", rank, socket.gethostname(),
                    explain_code(code), extra=ANY_RANK,
                )  # fmt: skip
        if any(is_stop(code) for code in codes.values()):
            _wait(self.living(), LEAVE_SECONDS)
        trees = [psutil.Process(process.pid) for process in self.living()]
        for process in list(trees):
            with suppress(psutil.Error):
                trees += process.children(recursive=True)
        for process in trees:
            with suppress(psutil.Error):
                process.terminate()
                process.send_signal(signal.SIGCONT)  # a stopped process gets no other signal
        _wait(self.living(), GRACE_SECONDS)
        for process in trees:
            with suppress(psutil.Error):
                process.kill()


def _wait(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)


def visible_gpus(slots: str, own: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of ranks on these slots, where the user's own is `own`: slot n is its n-th GPU.

    DeepSpeed counts all GPUs of the machine, whichever were chosen. Raises UserError for a slot beyond the list.
    """
    if own is None or own == slots:
        return slots
    listed = list(itertools.takewhile(lambda name: name not in ("", "-1"), (name.strip() for name in own.split(","))))
    places = [int(slot) for slot in slots.split(",")]
    if not listed:
        return own  # no GPU: the ranks are on the CPU
    if max(places) >= len(listed):
        if not has_gpu():
            return slots
        raise UserError(f"{VISIBLE}={own} names {len(listed)} GPU(s), and the launcher was given the slots {slots}, "
                        f"counted from 0 among them; start {len(listed)} rank(s), or name more GPUs.")  # fmt: skip
    return ",".join(listed[place] for place in places)


def has_gpu() -> bool:
    """Whether torch can use a GPU here."""
    import torch

    return torch.cuda.is_available()


def launcher_is_gone(parent: int) -> bool:
    """Whether the process that started this one has ended, or nobody reads its output any more (ssh has dropped)."""
    if os.getppid() != parent:
        return True
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _watch_launcher(parent: int) -> None:
    while not launcher_is_gone(parent):
        time.sleep(0.25)
    log.warning("the launcher is gone, which counts as SIGTERM", extra=ANY_RANK)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Runs deepspeed.launcher.launch; returns the exit code of the rank that ended first, as a shell tells it."""
    log_to_console()
    host, parent = Host(), os.getppid()
    for number in STOP_SIGNALS:
        signal.signal(number, host.pass_on)
    threading.Thread(target=_watch_launcher, args=(parent,), daemon=True).start()
    from deepspeed.launcher import launch

    changes = {
        "subprocess": SimpleNamespace(Popen=host.spawn),
        "signal": SimpleNamespace(SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM, signal=lambda number, handler: None),
        "terminate_process_tree": host.end_ranks,
    }
    hush_echoes()
    sys.argv[1:1] = quiet_flags(sys.argv[1:])  # pdsh's command carries no level
    for name, value in changes.items():
        assert hasattr(launch, name), f"deepspeed.launcher.launch has no {name}"
        setattr(launch, name, value)
    try:
        launch.main()
    except UserError as error:
        log.error("error: %s", error, extra=ANY_RANK)
        return USER_ERROR
    except SystemExit as stopped:
        return shell_code(stopped.code) if isinstance(stopped.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
