"""Training runs as real processes for the fault drill: started, watched, hit, and searched for what they leave."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from tests.support.paths import ROOT
from tests.support.processes import child_environment

_SECONDS = 90.0  # any one thing; a start takes 10 s on two idle cores


def wait_until(what: str, holds: Callable[[], bool], seconds: float = _SECONDS) -> None:
    """Returns when `holds()` does; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)


class Run:
    """scripts/train.py on two ranks by ptp_ds.launch.launcher, in a process group of its own, its output in files.

    member: of a population, the folder below --output_dir whose log is watched.
    """

    def __init__(self, out: Path, args: Sequence[object], launch: Sequence[str], logs: Path, member: str = "") -> None:
        self.out, self.logs, self.member = out, logs, member
        self.logs.mkdir(parents=True, exist_ok=True)
        self.first = self.step()
        command = [sys.executable, "-m", "ptp_ds.launch", *launch, "--hostfile", str(ROOT / "hostfiles" / "local"),
                   str(ROOT / "scripts" / "train.py"), "--ds_config", str(ROOT / "ds_configs" / "zero3.json"),
                   "--output_dir", str(out), *map(str, args)]  # fmt: skip
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = child_environment({"PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"})
        with open(self.logs / "stdout", "w") as stdout, open(self.logs / "stderr", "w") as stderr:
            self.launcher = subprocess.Popen(
                command, cwd=self.logs, env=env, stdout=stdout, stderr=stderr, start_new_session=True
            )
        self.family: list[psutil.Process] = []

    @property
    def stdout(self) -> str:
        return (self.logs / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.logs / "stderr").read_text()

    def step(self) -> int:
        """The last logged step, 0 before there is one."""
        log = self.out / self.member / "log.jsonl"
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")] if log.is_file() else []
        return max((json.loads(line)["step"] for line in lines), default=0)

    def train(self, steps: int = 3) -> None:
        """Returns when the run has logged that many steps of its own; remembers its processes."""

        def reached() -> bool:
            assert self.launcher.poll() is None, self.stderr[-3000:]
            return self.step() >= self.first + steps

        wait_until("training", reached)
        self.remember()

    def remember(self) -> None:
        """Adds the processes that run now to `family`."""
        now = psutil.Process(self.launcher.pid)
        self.family = list({*self.family, now, *now.children(recursive=True)})

    def rank(self, number: int) -> psutil.Process:
        """The living process of a rank."""
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            try:
                if process.environ().get("RANK") == str(number) and "train.py" in " ".join(process.cmdline()):
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"no rank {number}")

    def left(self) -> list[psutil.Process]:
        """Processes of the run that still live."""
        return [process for process in self.family if process.is_running() and process.status() != "zombie"]

    def finish(self, seconds: float = _SECONDS) -> int:
        """Waits for the launcher and returns its exit code; no process of the run may outlive it."""
        code = self.launcher.wait(seconds)
        wait_until("no orphan", lambda: not self.left(), 3)
        return code

    def end(self) -> None:
        """Kills whatever a failed test has left."""
        self.remember() if self.launcher.poll() is None else None
        for process in [*self.left()]:
            process.kill()
        self.launcher.wait(10)


def saved(out: Path) -> list[str]:
    """Names in checkpoints/, hidden ones too."""
    folder = out / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def line_with(text: str, part: str) -> str:
    """The first line that holds `part`."""
    found = [line for line in text.splitlines() if part in line]
    assert found, f"no line with {part!r} in:\n{text[-3000:]}"
    return found[0]
