"""The fault drill: each fault made for real, what the user sees, and that nothing saved is lost.

One uninterrupted run of two ranks is what every broken and resumed run has to equal, bit for bit. Rows of the table
are handed to `drill_row`; conftest.py prints them.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptp_ds.tasks.data import DEMO_DATA
from ptp_ds.training.checkpoint import list_checkpoints, load_checkpoint
from tests.support.drill import Run, line_with, saved, wait_until

pytestmark = pytest.mark.drill
STEPS = 200
ARGS = ["--task", "COPA", "--prompt_length", "100", "--batch_size", "4", "--eval_tokens", "4000", "--log_every", "1",
        "--eval_every", "0", "--perturbation", "gaussian", "--max_steps", STEPS, "--lr", "0.01",
        "--precision", "fp32"]  # fmt: skip


def state(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:06}" / "state.safetensors")


def assert_same(out: Path, whole: Path, step: int = STEPS) -> None:
    ours, theirs = state(out, step), state(whole, step)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    result, expected = (json.loads((folder / "result.json").read_text()) for folder in (out, whole))
    assert result["metrics"] == expected["metrics"]
    assert result["eval_cross_entropy"] == expected["eval_cross_entropy"]


@pytest.fixture
def start(tiny_model):
    """start(out, *args, launch=(), logs=None): a Run; whatever is left of it is killed at the end."""
    runs: list[Run] = []

    def begin(
        out: Path, *args: object, launch: Sequence[str] = (), logs: Path | None = None, member: str = ""
    ) -> Run:  # fmt: skip
        runs.append(Run(out, [*ARGS, "--model", tiny_model, *args], launch, logs or out.parent, member))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """The folder of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run = Run(out, [*ARGS, "--model", tiny_model, "--save_every", "0"], (), out.parent)
    try:
        assert run.finish() == 0, run.stderr[-3000:]
    finally:
        run.end()
    return out


def hit(run: Run, target: str, number: int) -> None:
    if target == "the launcher":
        run.launcher.send_signal(number)
    elif target == "one rank":
        run.rank(1).send_signal(number)
    else:
        os.killpg(run.launcher.pid, number)


def stop_and_resume(start, out, keep, drill_row, number, target):
    """One more part of the run in `out`, ended by a signal: saved once, at the step that it says."""
    before = saved(out)
    run = start(out, *keep)
    run.train()
    hit(run, target, number)
    assert run.finish() == 128 + number, run.stderr[-3000:]
    told = line_with(run.stdout, f"stopped by signal {int(number)} after step")
    assert run.stdout.count("stopped by signal") == 1
    assert "Traceback" not in run.stderr
    new = sorted(set(saved(out)) - set(before))
    assert new == [f"step-{run.step():06}"], (before, saved(out))
    drill_row(f"{number.name} to {target}", "kill, two ranks", told, "nothing: saved once, no orphan")


FAST_STOP = (signal.SIGTERM, "the launcher")


@pytest.mark.slow
def test_the_other_signals(start, whole, tmp_path, drill_row):
    """Each signal to each target, but for the next test's, and the launcher's death: stops of one run, then its end."""
    out = tmp_path / "run"
    keep = ["--save_every", "0", "--keep_checkpoints", "99", "--resume", "auto"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        for target in ("the launcher", "one rank", "all processes"):
            if (number, target) != FAST_STOP:
                stop_and_resume(start, out, keep, drill_row, number, target)
    run = start(out, *keep)
    run.train()
    run.launcher.kill()
    wait_until("ranks that stop by themselves", lambda: not run.left())
    line_with(run.stderr, "the launcher is gone, which counts as SIGTERM")
    told = line_with(run.stdout, "stopped by signal 15 after step")
    drill_row("SIGKILL to the launcher", "kill -9", told, "nothing: saved once, no orphan")
    run = start(out, *keep)
    assert run.finish() == 0, run.stderr[-3000:]
    assert_same(out, whole)


@pytest.mark.slow  # each by itself: tests/commands/test_train.py and test_bad_input.py
def test_a_signal_and_changed_data(start, run_train, tiny_model, tmp_path, drill_row):
    """A run of 60 steps is stopped by a signal, refuses other data, and goes on to the end with its own."""
    out, data, steps = tmp_path / "run", tmp_path / "data", ["--max_steps", "60"]
    shutil.copytree(DEMO_DATA / "COPA", data / "COPA")
    whole = tmp_path / "whole"
    done = run_train([*ARGS, "--model", tiny_model, *steps, "--save_every", "0", "--output_dir", whole], nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    keep = [*steps, "--save_every", "0", "--keep_checkpoints", "99", "--data_dir", data, "--resume", "auto"]
    stop_and_resume(start, out, keep, drill_row, *FAST_STOP)
    before, file = saved(out), data / "COPA" / "train.jsonl"
    rows = file.read_text(encoding="utf-8")
    file.write_text(rows.replace("The", "One", 1), encoding="utf-8")
    run = start(out, *keep, launch=["--max_restarts", "3"])
    assert run.finish() == 2
    told = line_with(run.stderr, "error: ")
    assert "is a checkpoint of another run: its training data is" in told
    assert "restart" not in run.stderr
    assert saved(out) == before
    drill_row("a data file changes before a resume", "one word of train.jsonl replaced", told, "nothing: refused")
    file.write_text(rows, encoding="utf-8")
    run = start(out, *keep)
    assert run.finish() == 0, run.stderr[-3000:]
    assert_same(out, whole, 60)


@pytest.mark.slow
def test_ranks_that_die_or_hang_and_max_restarts(start, whole, tmp_path, drill_row):
    """A rank is killed, in the next attempt one hangs, the third one ends: with the uninterrupted run's result."""
    out = tmp_path / "run"
    run = start(out, "--save_every", "10", "--stall_timeout", "4", launch=["--max_restarts", "2"])
    run.train(15)
    run.rank(1).kill()
    wait_until("the restart", lambda: "restart 1 of 2" in run.stderr)
    told = line_with(run.stderr, "error: rank 1 on ")
    assert "was killed by SIGKILL, by hand or by the system for lack of memory" in told
    line_with(run.stderr, "error on rank 0: another rank is gone, its connection broke")
    assert "Traceback" not in run.stderr
    again = line_with(run.stderr, "restart 1 of 2: the ranks ended with code")
    assert "going on from step-0000" in again
    wait_until("the second attempt", lambda: run.stdout.count("resumed behind step") == 1)
    first = int(line_with(run.stdout, "resumed behind step").split()[-1])
    wait_until("training", lambda: f"\nstep {first + 15}/" in run.stdout.split("resumed behind")[1])
    run.remember()
    redone = "nothing saved; steps since the last checkpoint are done again"
    drill_row("a rank is killed", "kill -9 of rank 1, --max_restarts 2", told, redone)
    run.rank(0).send_signal(signal.SIGSTOP)
    assert run.finish() == 0, run.stderr[-3000:]
    told = line_with(run.stderr, "nothing has moved for")
    assert told.startswith("error on rank 1: nothing has moved for ")
    assert "(--stall_timeout 4) in optimizer step " in told
    assert 'trainer.py", line' in run.stderr.split(told)[1].split("restart")[0]
    line_with(run.stderr, "restart 2 of 2: the ranks ended with code")
    drill_row("a rank hangs", "kill -STOP of rank 0, --stall_timeout 4", told, redone)
    assert run.stdout.count("resumed behind step") == 2
    assert_same(out, whole)


class Disk:
    """A disk that can be filled up and made read-only: a small mount as root, else limits and permissions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
        self.mounted = made.returncode == 0

    def fill(self, run: Run) -> tuple[str, str]:
        """Leaves no room for what a run writes; returns how, and the system's words for it."""
        if not self.mounted:
            resource.prlimit(run.rank(0).pid, resource.RLIMIT_FSIZE, (1000, 1000))
            return "a limit on file sizes (no mounts here)", "File too large"
        with open(self.filler, "wb", buffering=0) as out, contextlib.suppress(OSError):
            while out.write(bytes(4096)):
                pass
        os.truncate(self.filler, self.filler.stat().st_size - 24 * 1024)  # for some log lines, not for a checkpoint
        return "a 2 MB disk is filled up", "No space left on device"

    def protect(self, folder: Path) -> tuple[str, str]:
        """Makes a folder read-only; returns how, and the system's words for it."""
        if not self.mounted:
            folder.chmod(0o500)
            return "chmod 500 (no mounts here)", "Permission denied"
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        return "mount -o remount,ro", "Read-only file system"

    def repair(self) -> None:
        """Takes all of that back."""
        self.filler.unlink(missing_ok=True)
        for folder in self.folder.glob("*/checkpoints"):
            folder.chmod(0o700) if not self.mounted else subprocess.run(["umount", folder], capture_output=True)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = Disk(folder)
    folder.chmod(0o500)
    if not made.mounted and os.access(folder, os.W_OK):
        pytest.skip("no small disk can be mounted here, and permissions don't hold this user back")
    folder.chmod(0o700)
    yield made
    made.repair()
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


def assert_whole(out: Path, before: list[str]) -> None:
    """Each checkpoint loads and has its hash; of those before, only the oldest may have made room for newer ones."""
    assert set(before[1:]) <= set(saved(out))
    for folder in list_checkpoints(out / "checkpoints"):
        load_checkpoint(folder)
    assert len(saved(out)) == len(list_checkpoints(out / "checkpoints"))  # and nothing half written is left


@pytest.mark.slow
def test_disk_full_read_only_and_damaged(start, whole, disk, tmp_path, drill_row):
    out, keep = disk.folder / "run", ["--save_every", "10", "--keep_checkpoints", "5", "--resume", "auto"]
    run = start(out, *keep, logs=tmp_path)
    run.train(25)
    before, (made, words) = saved(out), disk.fill(run)
    assert run.finish() == 2
    told = line_with(run.stderr, f"error: Can't write to {out}: {words}.")
    assert [line for line in run.stderr.splitlines() if line.startswith("error")] == [told]
    disk.repair()
    assert_whole(out, before)
    if disk.mounted:
        assert run.step() % 10 == 0  # it was logged, and failed as it was saved
    drill_row("disk full while saving", made, told, "nothing that was saved")

    run = start(out, *keep, logs=tmp_path)
    run.train(12)
    before, (made, words) = saved(out), disk.protect(out / "checkpoints")
    assert run.finish() == 2
    told = line_with(run.stderr, f"error: Can't write to {out}: {words}.")
    assert "make it writable and go on with --resume auto" in told
    disk.repair()
    assert_whole(out, before)
    drill_row("read-only output while saving", made, told, "nothing that was saved")

    newest, one_before = saved(out)[-1], saved(out)[-2]
    file = out / "checkpoints" / newest / "state.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    run = start(out, "--resume", file.parent, logs=tmp_path)
    assert run.finish() == 2
    refused = line_with(run.stderr, "is missing or altered (its sha256 differs); resume from another checkpoint.")
    assert file.is_file()
    drill_row("a damaged checkpoint, named", "state.safetensors cut short", refused, "nothing: refused")
    run = start(out, *keep, logs=tmp_path)
    assert run.finish() == 0, run.stderr[-3000:]
    told = line_with(run.stderr, "warning: ")
    assert f"{newest}/state.safetensors is missing or altered" in told
    assert f"going on from {one_before}, the one before" in told
    assert f"resumed behind step {int(one_before.removeprefix('step-'))}" in run.stdout
    assert f"{newest}.damaged" in saved(out)
    drill_row("a damaged checkpoint, --resume auto", "the same", told, "steps between the two, redone")
    assert_same(out, whole)


@pytest.mark.slow
def test_non_finite_loss(start, tmp_path, drill_row):
    """A user's error, so --max_restarts doesn't repeat it."""
    run = start(tmp_path / "run", "--sigma", "1e42", "--save_every", "10", launch=["--max_restarts", "3"])
    assert run.finish() == 2
    told = line_with(run.stderr, "error: ")
    assert told.startswith("error: The loss is not finite at step 1; nothing was saved after the last checkpoint.")
    assert saved(run.out) == []
    assert "restart" not in run.stderr
    drill_row("non-finite loss", "--sigma 1e42", told, "nothing: no broken state is saved")


def test_two_hosts(hosts, whole, tmp_path, drill_row):
    """The launcher is killed, then a host's link is taken down: the other one goes on alone, on one rank, not two."""
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    model = json.loads((whole / "config.json").read_text())["run"]["model"]
    quick = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"}
    command = ["deepspeed", "--max_restarts", "2", "--hostfile", hosts.hostfile, "scripts/train.py", "--ds_config",
               "ds_configs/zero3.json", *ARGS, "--model", model, "--output_dir", out, "--save_every", "10",
               "--keep_checkpoints", "99", "--stall_timeout", "5", "--resume", "auto"]  # fmt: skip

    def trained(steps: int) -> None:
        wait_until("training", lambda: log.is_file() and log.read_text().count('"train"') > steps)

    def ended() -> bool:
        return all(hosts.processes(host, "train.py") == [] for host in ("host1", "host2"))

    run = hosts.start(command, env=quick)
    try:
        trained(12)
        hosts.tell(run, signal.SIGKILL)
        wait_until("the ranks to stop", ended, 30)
    finally:
        run.kill()
    run.communicate()
    last = saved(out)[-1]
    assert int(last.removeprefix("step-")) == log.read_text().count('"train"')  # saved as it stopped
    seen = f"nothing, its terminal is gone; {last} is there"
    drill_row("SIGKILL to the launcher of two hosts", "kill -9", seen, "nothing: saved once, no orphan")
    run = hosts.start(command, env=quick)
    try:
        trained(int(last.removeprefix("step-")) + 12)
        hosts.take_link_down("host2")
        printed, errors = run.communicate(timeout=150)
    finally:
        run.kill()
    assert run.returncode == 0, errors[-3000:]
    line_with(errors, "error on rank 0: nothing has moved for ")
    told = line_with(errors, "restart 1 of 2: host2 can't be reached by ssh and is left out")
    assert "restart 2" not in errors
    assert printed.count("resumed behind step") == 2
    wait_until("host2's rank to end itself", lambda: hosts.processes("host2", "train.py") == [], 60)
    assert hosts.processes("host1", "train.py") == []
    ours, theirs = state(out), state(whole)
    for name, tensor in theirs.items():
        assert float((ours[name] - tensor).norm()) <= 1e-5 * float(tensor.norm()), name
    assert json.loads((out / "result.json").read_text())["world_size"] == 1
    lost = "nothing saved; steps since the last checkpoint are done again, on one rank, equal to 1e-5"
    drill_row("a host vanishes", "ip link set eth0 down, --max_restarts 2", told, lost)


@pytest.mark.slow
def test_a_population_is_killed_stopped_and_started_again(start, tmp_path, drill_row):
    """Three prompts on two ranks: a rank is killed and the launcher starts all anew; then a stop, and a resume."""
    members = [{"name": "a", "seed": 1}, {"name": "b", "seed": 2, "prompt_length": 30},
               {"name": "c", "seed": 3, "lr": 1e-9, "patience": 1}]  # fmt: skip
    (tmp_path / "members.json").write_text(json.dumps(members))
    given = ["--population", tmp_path / "members.json", "--max_steps", 80, "--save_every", 10, "--eval_every", 10]
    whole, out, watched = tmp_path / "whole" / "run", tmp_path / "hit" / "run", "members/a"
    assert start(whole, *given, member=watched).finish() == 0
    run = start(out, *given, "--resume", "auto", launch=["--max_restarts", "1"], member=watched)
    wait_until("a checkpoint of the last member", lambda: saved(out / "members" / "b"))
    run.rank(1).kill()
    wait_until("training goes on", lambda: run.step() >= 45)
    run.remember()
    run.launcher.terminate()
    assert run.finish() == 128 + signal.SIGTERM, run.stderr[-3000:]
    assert "stopped by signal 15; saved: --resume auto goes on" in run.stdout
    again = start(out, *given, "--resume", "auto", member=watched, logs=tmp_path / "again")
    assert again.finish() == 0, again.stderr[-3000:]
    for name, step in (("a", 80), ("b", 80), ("c", 20)):
        assert_same(out / "members" / name, whole / "members" / name, step)
    summaries = [json.loads((folder / "population.json").read_text())["summary"] for folder in (out, whole)]
    assert summaries[0] == summaries[1]
    told = line_with(again.stdout, "resumed behind step")
    drill_row("SIGKILL to a rank of a population, then SIGTERM", "kill, two ranks", told, "nothing behind a checkpoint")
