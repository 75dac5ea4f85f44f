"""The `deepspeed` command of this project's environment: DeepSpeed's own launcher with two gaps closed.

DeepSpeed asks ssh for the address of every host of a hostfile, this machine included, so on a machine without an ssh
server even `localhost slots=2` fails: where the hostfile names this machine alone, ssh is left out. And its runner
leaves the ranks behind when it is terminated: SIGTERM is passed on to them, so that they save and stop.

scripts/setup_env.sh installs it in .venv/bin; elsewhere use `python -m ptp_ds.launch` in the place of `deepspeed`.
"""

import itertools
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ptp_ds.distributed import free_port, prepare_environment

_LOCAL = {"localhost", "127.0.0.1", "::1"}


def hosts_of(hostfile: str) -> list[str]:
    """Host names of a hostfile, none where there is no such file."""
    path = Path(hostfile)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]


def local_only_flags(argv: Sequence[str]) -> list[str]:
    """The flags that keep ssh out of a run whose hostfile names this machine alone; none in any other case."""
    hostfile = None
    own = list(itertools.takewhile(lambda word: not word.endswith(".py"), argv))  # what follows belongs to the script
    for place, word in enumerate(own):
        if word in ("-H", "--hostfile") and place + 1 < len(own):
            hostfile = own[place + 1]
        elif word.startswith("--hostfile="):
            hostfile = word.split("=", 1)[1]
        elif word.startswith(("--no_ssh", "--master_addr", "--force_multi")):
            return []
    hosts = hosts_of(hostfile) if hostfile else []
    if len(hosts) != 1 or hosts[0] not in {*_LOCAL, socket.gethostname()}:
        return []
    port = [] if any(word.startswith("--master_port") for word in own) else ["--master_port", str(free_port())]
    return ["--no_ssh_check", "--master_addr", "127.0.0.1", *port]


def _pass_on(number: int, frame: object) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        os.kill(int(child), number)


def main() -> None:
    """Runs DeepSpeed's launcher with the command line's arguments; its exit code is the ranks'."""
    prepare_environment()
    from deepspeed.launcher.runner import main as run_deepspeed

    argv = sys.argv[1:]
    signal.signal(signal.SIGTERM, _pass_on)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # a terminal's Ctrl-C reaches the ranks by itself
    run_deepspeed([*local_only_flags(argv), *argv])


if __name__ == "__main__":
    main()
