"""The `deepspeed` command of this project's environment: DeepSpeed's own launcher with its gaps closed.

DeepSpeed asks ssh for the address of every host of a hostfile, this machine included, so on a machine without an ssh
server even `localhost slots=2` fails: where the hostfile names this machine alone, ssh is left out. Its runner leaves
the ranks behind when it is terminated, or kills them while they save: here SIGTERM, SIGINT and SIGUSR1 are passed on
(launch.node does so on each host), and the command ends when the ranks have. `--max_restarts N`, before the script,
starts a run again whose ranks died (ptp_ds.launch.restarts).

Where the hostfile names other hosts, DeepSpeed takes the first address that the first host lists, port 29500 and no
interface: ptp_ds.hosts.hostfile finds and checks them, and ptp_ds.launch.job takes signals to the ranks of every host.

scripts/setup_env.sh installs it in .venv/bin; elsewhere use `python -m ptp_ds.launch` in the place of `deepspeed`.
"""

import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from ptp_ds.errors import UserError
from ptp_ds.files import is_file
from ptp_ds.hosts.hostfile import deepspeed_refusals, hosts_of, named_hostfile
from ptp_ds.hosts.probe import take_port
from ptp_ds.launch.quiet import hush_echoes, quiet_flags
from ptp_ds.ranks.distributed import prepare_environment
from ptp_ds.ranks.faults import STOP_SIGNALS, USER_ERROR, shell_code
from ptp_ds.ranks.log import ANY_RANK, get_logger, log_to_console
from ptp_ds.redact import is_secret

log = get_logger(__name__)

_NO_VARIABLE = "PTP_DS_NOT_SET"
_LOCAL = {"localhost", "127.0.0.1", "::1"}


def local_only_flags(argv: Sequence[str]) -> list[str]:
    """A free port for a run of this machine alone, and, where a hostfile names it, the flags that keep ssh out.

    None in any other case.
    """
    from deepspeed.launcher.runner import DLTS_HOSTFILE

    hostfile = DLTS_HOSTFILE if is_file(DLTS_HOSTFILE) else None
    own = list(itertools.takewhile(lambda word: not word.endswith(".py"), argv))  # what follows belongs to the script
    for place, word in enumerate(own):
        if word in ("-H", "--hostfile") and place + 1 < len(own):
            hostfile = own[place + 1]
        elif word.startswith("--hostfile="):
            hostfile = word.split("=", 1)[1]
        elif word.startswith(("--no_ssh", "--master_addr", "--force_multi")):
            return []
    hosts = hosts_of(hostfile) if hostfile else []
    if hostfile and (len(hosts) != 1 or hosts[0] not in {*_LOCAL, socket.gethostname()}):
        return []
    port = [] if any(word.startswith("--master_port") for word in own) else ["--master_port", str(take_port(None))]
    return ["--no_ssh_check", "--master_addr", "127.0.0.1", *port] if hostfile else port


def with_hostfile(own: Sequence[str], script: Sequence[str]) -> list[str]:
    """The launcher's own flags with the hostfile that they name, if any, as a path. Raises UserError for none there."""
    from deepspeed.launcher.runner import DLTS_HOSTFILE, parse_args

    args = parse_args([*own, *script])
    if args.hostfile == DLTS_HOSTFILE:  # its default
        return list(own)
    place = len(own) + len(script) - len(args.user_args) - 1  # the script's, or a module's
    return [*own[:place], "--hostfile", named_hostfile(args.hostfile), *own[place:]]  # the last one counts


def split_command(argv: Sequence[str]) -> tuple[int, list[str], list[str]]:
    """(--max_restarts, DeepSpeed's own flags, the script and its arguments). Raises ValueError for a bad number."""
    own = list(itertools.takewhile(lambda word: not word.endswith(".py"), argv))
    script, count = list(argv[len(own) :]), "0"
    kept: list[str] = []
    words = iter(own)
    for word in words:
        name, given, value = word.partition("=")
        if name == "--max_restarts":
            count = value if given else next(words, "")
        else:
            kept.append(word)
    if not count.isdecimal():
        raise UserError(f"--max_restarts is {count!r}; expected a whole number of 0 or more, before the script.")
    return int(count), kept, script


class Launcher:
    """DeepSpeed's runner, attempt by attempt. environment: the user's own, before this project adds to it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.received = 0
        self._child: subprocess.Popen | None = None

    def listen(self) -> None:
        """Takes the stop signals."""
        for number in STOP_SIGNALS:
            signal.signal(number, self.pass_on)

    def pass_on(self, number: int, frame: object = None) -> None:
        """Hands a signal to this machine's ranks; with none yet, or none any more, the command ends."""
        self.received = self.received or number
        if self._child is None or self._child.poll() is not None:
            raise SystemExit(128 + number)
        self._child.send_signal(number)

    def spawn(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen:
        """The runner's Popen: ptp_ds.launch.node in the place of DeepSpeed's launcher of a host."""
        if self.received:
            raise SystemExit(128 + self.received)
        own = ["ptp_ds.launch.node" if word == "deepspeed.launcher.launch" else word for word in command]
        self._child = subprocess.Popen(own, env=env)
        return self._child

    def attempt(self, argv: Sequence[str]) -> int:
        """One run; returns its ranks' exit code, as a shell tells it."""
        hush_echoes()
        local = local_only_flags(argv)
        if not local and (code := self._on_hosts(argv)) is not None:
            return code
        self._child = None
        try:
            self._deepspeed([*local, *argv])
        except SystemExit as ended:
            if self._child is None or self._child.poll() is None:
                self.received = self.received or signal.SIGTERM  # a signal, or DeepSpeed's own refusal
                return ended.code if isinstance(ended.code, int) else 1
        return shell_code(self._child.returncode) if self._child is not None else 0

    def _deepspeed(self, argv: Sequence[str], environment_file: Path | None = None) -> None:
        """DeepSpeed's launcher; environment_file stands in for the user's .deepspeed_env, whose lines it repeats.

        It would take CUDA_VISIBLE_DEVICES for slots, or drop it, and the next attempt would find none; launch.node
        keeps to it.
        """
        from deepspeed.accelerator import get_accelerator
        from deepspeed.launcher import runner

        from ptp_ds.launch.pdsh import QuotingRunner

        runner.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": self.spawn})
        runner.PDSHRunner = QuotingRunner
        # what it doesn't write into other hosts' command lines and its log; this machine's ranks have their secrets
        runner.EXCLUDE_ENVS = {**runner.EXCLUDE_ENVS, **{name: [name] for name in os.environ if is_secret(name)}}
        accelerator = get_accelerator()
        runner.get_accelerator = lambda: SimpleNamespace(
            device_count=accelerator.device_count, export_envs=accelerator.export_envs,
            visible_devices_envs=lambda: [_NO_VARIABLE],
        )  # fmt: skip
        if environment_file is not None:
            runner.DEEPSPEED_ENVIRONMENT_NAME = str(environment_file)
        with deepspeed_refusals():
            runner.main([*quiet_flags(argv), *argv])

    def _on_hosts(self, argv: Sequence[str]) -> int | None:
        """Runs a command line that names other hosts and returns its exit code; None for one that names none."""
        from ptp_ds.launch.job import run_job
        from ptp_ds.launch.job_plan import plan_job, write_environment

        job = plan_job(argv, self.environment, [*_LOCAL, socket.gethostname()])
        if job is None:
            return None
        log.info("%s", job.describe(), extra=ANY_RANK)
        _notice_lost_hosts()
        with tempfile.TemporaryDirectory(prefix="ptp_ds_job") as folder:
            file = Path(folder) / "environment"
            write_environment(job, file)
            try:
                return run_job(job, lambda: self._as_child([*job.flags, *argv], file))
            finally:
                self.listen()

    def _as_child(self, argv: Sequence[str], environment_file: Path) -> None:
        """DeepSpeed's launcher in the process that run_job forked; it and its ssh don't outlive the command itself."""
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
        self._deepspeed(argv, environment_file)


def _follow(parent: int) -> None:
    """Ends this process group when `parent` has ended; ptp_ds.launch.node then notices that its ssh has."""
    while os.getppid() == parent:
        time.sleep(0.25)
    os.killpg(0, signal.SIGKILL)


def _notice_lost_hosts() -> None:
    """pdsh's ssh would wait for a host that has vanished for as long as TCP does."""
    given = os.environ.get("PDSH_SSH_ARGS_APPEND", "")
    if "ServerAlive" not in given:
        os.environ["PDSH_SSH_ARGS_APPEND"] = f"{given} -o ServerAliveInterval=10 -o ServerAliveCountMax=3".strip()


def run_attempts(launcher: Launcher, count: int, own: Sequence[str], script: Sequence[str]) -> int:
    """The first attempt and, where ranks die, up to `count` more that go on from it; the last one's code."""
    if not count:
        return launcher.attempt([*own, *script])
    from ptp_ds.launch.restarts import (  # takes seconds
        check_script,
        checkpoints_left,
        on_hosts_left,
        should_restart,
        start_of,
        with_resume,
    )

    check_script(script)
    before = checkpoints_left(script)
    code = launcher.attempt([*own, *script])
    for number in range(1, count + 1):
        if launcher.received or not should_restart(code):
            break
        with tempfile.TemporaryDirectory(prefix="ptp_ds_restart") as folder:
            left, told = on_hosts_left(own, script, Path(folder) / "hostfile")
            for sentence in told:
                log.warning("restart %d of %d: %s", number, count, sentence, extra=ANY_RANK)
            log.warning(
                "restart %d of %d: the ranks ended with code %d; going on from %s", number, count, code,
                start_of(script, before), extra=ANY_RANK,
            )  # fmt: skip
            code = launcher.attempt([*left, *with_resume(script, before)])
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs DeepSpeed's launcher with the command line's arguments; returns the ranks' exit code."""
    launcher = Launcher(dict(os.environ))
    launcher.listen()
    log_to_console()
    prepare_environment()
    try:
        count, own, script = split_command(sys.argv[1:] if argv is None else argv)
        return run_attempts(launcher, count, with_hostfile(own, script), script)
    except UserError as error:
        log.error("error: %s", error, extra=ANY_RANK)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
