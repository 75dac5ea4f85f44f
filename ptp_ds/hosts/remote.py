"""Questions to other hosts over plain ssh: BatchMode, no password, a bounded wait."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ptp_ds.errors import UserError
from ptp_ds.hosts import probe as host_probe

_CONNECT_SECONDS = 10
_PARALLEL = 256


class HostError(UserError):
    """A host that gave no answer. kind: "ssh" (not reachable), "python" (not there) or "probe" (it failed)."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def ssh_command(host: str, port: int | None = None) -> list[str]:
    """ssh to a host as pdsh calls it, but never asking for anything."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_SECONDS}"]
    options += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", *options, *(["-p", str(port)] if port is not None else []), host]


def ask(
    host: str, request: Mapping[str, Any], port: int | None = None, timeout: float = 60,
    exports: Mapping[str, str] | None = None, local: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """host_probe's reply on a host, by the interpreter of this process' path. Raises HostError where there is none.

    exports: variables it runs with. local: the host is this machine and needs no ssh.
    """
    program = Path(host_probe.__file__).read_text(encoding="utf-8")
    settings = [f"{name}={shlex.quote(value)}" for name, value in (exports or {}).items()]
    words = ["env", *settings, shlex.quote(sys.executable), "-", shlex.quote(json.dumps(request))]
    command = [*(["sh", "-c"] if local else ssh_command(host, port)), " ".join(words)]
    try:
        done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise HostError("ssh", f"{host} didn't answer within {timeout:.0f} seconds over ssh.") from None
    except FileNotFoundError:
        raise HostError("ssh", "There is no ssh on this machine; install an ssh client.") from None
    for line in done.stdout.splitlines():
        if line.startswith(host_probe.MARK):
            return {**json.loads(line.removeprefix(host_probe.MARK)), "received": time.time()}
    raise _failure(host, done)


def _failure(host: str, done: subprocess.CompletedProcess) -> HostError:
    lines = done.stderr.strip().splitlines()
    last = lines[-1].strip() if lines else f"exit code {done.returncode}"
    if done.returncode == 255:
        return HostError(
            "ssh", f"{host} can't be reached by ssh without a password ({last}); `ssh -o BatchMode=yes {host} true` "
            "must work.")  # fmt: skip
    if done.returncode in (126, 127):
        return HostError(
            "python", f"{host} has no {sys.executable}; set the environment up under the same path on every host "
            "(bash scripts/setup_env.sh there, or a shared disk).")  # fmt: skip
    return HostError("probe", f"{host} couldn't be asked about itself ({last}).")


def ask_all(
    hosts: Sequence[str], requests: Mapping[str, Mapping[str, Any]], port: int | None = None, timeout: float = 60,
    exports: Mapping[str, str] | None = None, local: bool = False,
) -> dict[str, dict[str, Any] | HostError]:  # fmt: skip
    """Each host's reply to its own request, or the error in its place; all hosts are asked at once."""

    def one(host: str) -> dict[str, Any] | HostError:
        try:
            return ask(host, requests[host], port, timeout, exports, local)
        except HostError as error:
            return error

    with ThreadPoolExecutor(min(_PARALLEL, max(1, len(hosts)))) as pool:
        return dict(zip(hosts, pool.map(one, hosts), strict=True))
