"""Runs of the project's scripts without their imports: forks of one process that has made them.

Torch, DeepSpeed and transformers take four seconds to import, longer than a tiny run. A zygote imports them once and
forks a child for each run, or one for each rank: a process of its own with its own environment, working folder and
output, in which the script starts as python would start it. Tests of launchers, of signals and of what happens at
import start real processes instead.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.processes import worker_environment

_SECONDS = 170.0


def run_script(
    script: str | Path, arguments: Sequence[object], folder: Path | None = None, ranks: int = 1
) -> subprocess.CompletedProcess[str]:
    """A script of scripts/ by its name, or any by its path, as python runs it in `folder`, or torchrun on `ranks`."""
    return _zygote().run(ROOT / "scripts" / script, arguments, folder or Path.cwd(), ranks)


@cache
def _zygote() -> "Zygote":
    """The one of this process, started when it is first asked for."""
    started = Zygote()
    atexit.register(started.end)
    return started


class Zygote:
    """The process that forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=worker_environment(), cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(
        self, script: Path, arguments: Sequence[object], folder: Path, ranks: int = 1
    ) -> subprocess.CompletedProcess[str]:
        """The script in `folder`, as by plain python, or as torchrun starts it on several ranks."""
        argv = [str(script), *map(str, arguments)]
        with tempfile.TemporaryDirectory() as name:
            logs = Path(name)
            asked = {"argv": argv, "folder": str(folder), "ranks": ranks, "logs": name, "seconds": _SECONDS}
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, f"the zygote has ended with code {self._process.poll()}"
            code = int(answer)
            said = [(logs / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")]
        if code == _LATE:
            raise subprocess.TimeoutExpired(argv, _SECONDS, *said)
        return subprocess.CompletedProcess(argv, code, *said)

    def end(self) -> None:
        """Ends the zygote; runs have ended before."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


_LATE = 1000  # no exit code


def _warm() -> None:
    """What scripts import, and what they reach only on their way."""
    from ptp_ds.ranks.distributed import prepare_environment

    prepare_environment()
    import deepspeed.ops  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import ptp_ds.commands.evaluate
    import ptp_ds.commands.predict
    import ptp_ds.commands.train  # noqa: F401
    from ptp_ds.training.engine import import_muon

    import_muon()


def _serve() -> None:
    _warm()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        children = [_fork(asked, rank, port) for port in [_free_port()] for rank in range(asked["ranks"])]
        answers.write(f"{_wait(children, asked['seconds'])}\n")
        answers.flush()


def _free_port() -> str:
    from ptp_ds.hosts.probe import take_port

    return str(take_port(None))


def _fork(asked: dict[str, Any], rank: int, port: str) -> int:
    child = os.fork()
    if child:
        return child
    import runpy

    from ptp_ds.launch.job import end_fork

    def run() -> None:
        _become(asked, rank, port)
        runpy.run_path(asked["argv"][0], run_name="__main__")

    end_fork(run)


def _become(asked: dict[str, Any], rank: int, port: str) -> None:
    """Gives a fork the folder, the arguments, the output and the launcher's variables of a run."""
    for number, name in enumerate(("stdout", "stderr"), 1):
        file = os.open(f"{asked['logs']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(asked["folder"])
    sys.argv = asked["argv"]
    sys.path[0] = os.path.dirname(asked["argv"][0])
    world = asked["ranks"]
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port,
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}  # fmt: skip


def _wait(children: Sequence[int], seconds: float) -> int:
    """The exit code of the run: the first that isn't 0 ends the other ranks, as a launcher does."""
    left, code, end = set(children), 0, time.monotonic() + seconds
    while left:
        for child in list(left):
            found, status = os.waitpid(child, os.WNOHANG)
            if not found:
                continue
            left.discard(child)
            ended = os.waitstatus_to_exitcode(status)
            if ended and not code:
                code = ended
                for other in left:
                    os.kill(other, signal.SIGTERM)
        if time.monotonic() > end:
            for other in left:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return _LATE
        time.sleep(0.01)
    return code


if __name__ == "__main__":
    _serve()
