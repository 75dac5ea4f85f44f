"""The `deepspeed` command of this project's environment: DeepSpeed's own launcher with some gaps closed.

DeepSpeed asks ssh for the address of every host of a hostfile, this machine included, so on a machine without an ssh
server even `localhost slots=2` fails: where the hostfile names this machine alone, ssh is left out. And its runner
leaves the ranks behind when it is terminated: SIGTERM is passed on to them, so that they save and stop.

Where the hostfile names other hosts, DeepSpeed takes the first address that the first host lists, port 29500 and no
interface: ptp_ds.hosts finds and checks them, and ptp_ds.job takes signals to the ranks of every host.

scripts/setup_env.sh installs it in .venv/bin; elsewhere use `python -m ptp_ds.launch` in the place of `deepspeed`.
"""

import itertools
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptp_ds.distributed import free_port, prepare_environment
from ptp_ds.redact import is_secret

_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # what DeepSpeed 0.19.8 exports to other hosts
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


def _deepspeed(argv: Sequence[str], environment_file: Path | None = None) -> None:
    """DeepSpeed's launcher; environment_file stands in for the user's .deepspeed_env, whose lines it repeats."""
    from deepspeed.launcher import runner

    if environment_file is not None:
        runner.DEEPSPEED_ENVIRONMENT_NAME = str(environment_file)
    runner.main(list(argv))


def _run_on_hosts(argv: Sequence[str], own: Mapping[str, str]) -> int | None:
    """Runs a command line that names other hosts and returns its exit code; None for one that names none."""
    from ptp_ds.hosts import plan_job, write_environment
    from ptp_ds.job import run_job

    try:
        job = plan_job(argv, own, [*_LOCAL, socket.gethostname()])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    if job is None:
        return None
    print(job.describe(), flush=True)
    with tempfile.TemporaryDirectory(prefix="ptp_ds_job") as folder:
        file = Path(folder) / "environment"
        write_environment(job, file)
        return run_job(job, lambda: _deepspeed([*job.flags, *argv], file))


def keep_from_command_lines() -> None:
    """Drops secrets that DeepSpeed's runner would write into the other hosts' command lines and its log."""
    for name in [name for name in os.environ if name.startswith(_EXPORTED) and is_secret(name)]:
        del os.environ[name]


def main() -> None:
    """Runs DeepSpeed's launcher with the command line's arguments; its exit code is the ranks'."""
    own = dict(os.environ)
    prepare_environment()
    keep_from_command_lines()
    argv = sys.argv[1:]
    local = local_only_flags(argv)
    if not local:
        code = _run_on_hosts(argv, own)
        if code is not None:
            sys.exit(code)
    signal.signal(signal.SIGTERM, _pass_on)
    signal.signal(signal.SIGINT, lambda number, frame: None)  # a terminal's Ctrl-C reaches the ranks by itself
    _deepspeed([*local, *argv])


if __name__ == "__main__":
    main()
