"""The launcher: which hosts a hostfile names, and when ssh is left out."""

import base64
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from deepspeed.accelerator import get_accelerator

from ptp_ds.hosts.hostfile import hosts_of
from ptp_ds.launch import launcher as launch
from ptp_ds.launch import restarts
from ptp_ds.launch.launcher import Launcher, local_only_flags, run_attempts, split_command, with_hostfile
from ptp_ds.ranks.faults import STOP_SIGNALS
from ptp_ds.training.checkpoint import set_aside
from tests.support.paths import ROOT

HOSTFILES = ROOT / "hostfiles"


@pytest.fixture(autouse=True)
def _port(monkeypatch):
    monkeypatch.setattr(launch, "take_port", lambda wanted: 4321)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)  # main() takes them


@pytest.fixture
def started(monkeypatch) -> list[tuple[list[str], dict[str, str]]]:
    """The command lines that launchers start, with their environments; nothing is run."""
    found = []

    def spawn(launcher, command, env):
        found.append((command, dict(env)))
        launcher._child = subprocess.Popen(["true"])
        return launcher._child

    monkeypatch.setattr(Launcher, "spawn", spawn)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    return found


def hostfile(folder: Path, text: str) -> str:
    file = folder / "hosts"
    file.write_text(text, encoding="utf-8")
    return str(file)


WITHOUT_SSH = ["--no_ssh_check", "--master_addr", "127.0.0.1", "--master_port", "4321"]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("localhost slots=2\n", ["localhost"]),
        ("# all\n\n  # more\nworker-1 slots=8 \n\nworker-2 slots=8", ["worker-1", "worker-2"]),
        ("  worker-1 slots=4\n", ["worker-1"]),
        ("", []),
    ],
)
def test_hosts_of(tmp_path, text, hosts):
    assert hosts_of(hostfile(tmp_path, text)) == hosts


def test_hosts_of_a_missing_file(tmp_path):
    assert hosts_of(str(tmp_path / "none")) == []


def test_the_ready_hostfiles():
    assert hosts_of(str(HOSTFILES / "local")) == ["localhost"]
    assert len(set(hosts_of(str(HOSTFILES / "node8")))) == 8


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", socket.gethostname()])
def test_this_machine_alone_needs_no_ssh(tmp_path, host):
    file = hostfile(tmp_path, f"{host} slots=2\n")
    assert local_only_flags(["--hostfile", file, "scripts/train.py"]) == WITHOUT_SSH
    assert local_only_flags(["-H", file, "scripts/train.py"]) == WITHOUT_SSH
    assert local_only_flags([f"--hostfile={file}", "scripts/train.py"]) == WITHOUT_SSH


@pytest.mark.parametrize("text", ["worker-1 slots=2\n", "localhost slots=1\nworker-1 slots=1\n", ""])
def test_other_hosts_keep_ssh(tmp_path, text):
    assert local_only_flags(["--hostfile", hostfile(tmp_path, text), "scripts/train.py"]) == []


def test_runs_without_a_hostfile_have_a_port_of_their_own():
    """All would meet at DeepSpeed's port 29500."""
    assert local_only_flags(["--num_gpus", "2", "scripts/train.py"]) == ["--master_port", "4321"]
    assert local_only_flags(["--num_gpus", "2", "--master_port=9", "scripts/train.py"]) == []


@pytest.mark.parametrize("given", [["--hostfile", "local"], ["--hostfile=local"], ["-H", "local"], ["-Hlocal"]])
def test_a_packaged_hostfile_is_found_by_name_however_it_is_given(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, found = ["train.py", "--hostfile", "mine"], ["--hostfile", str(HOSTFILES / "local")]
    own = ["--launcher_args=-x", *given, "--num_gpus", "1"]
    assert with_hostfile(own, script) == [*own, *found]
    module = ["--module", "ptp_ds.ranks.collectives", "--hostfile", "mine"]
    assert with_hostfile([*given, *module], []) == [*given, module[0], *found, *module[1:]]
    assert with_hostfile(["--num_gpus", "1"], script) == ["--num_gpus", "1"]
    (tmp_path / "local").write_text("other slots=1\n", encoding="utf-8")  # what is here was meant
    assert with_hostfile(given, script)[-1] == "local"


@pytest.mark.parametrize("given", [["--hostfile", "nothere"], ["--hostfile=nothere"], ["-H", "nothere"]])
def test_a_hostfile_that_isnt_there_is_refused(given, started, capsys):
    """DeepSpeed would say so and train on this machine."""
    assert launch.main([*given, "train.py"]) == 2
    said = "error: --hostfile nothere: there is no such file; give a path, or a packaged one: local, node8.\n"
    assert (capsys.readouterr().err, started) == (said, [])


@pytest.mark.parametrize(
    "word", ["--no_ssh", "--no_ssh_check", "--master_addr", "--master_addr=10.0.0.1", "--force_multi"]
)
def test_a_users_own_choice_wins(tmp_path, word):
    file = hostfile(tmp_path, "localhost slots=2\n")
    assert local_only_flags(["--hostfile", file, word, "scripts/train.py"]) == []
    assert local_only_flags([word, "--hostfile", file, "scripts/train.py"]) == []


@pytest.mark.parametrize("given", [["--master_port", "9"], ["--master_port=9"]])
def test_a_users_own_port_is_kept(tmp_path, given):
    file = hostfile(tmp_path, "localhost slots=2\n")
    assert local_only_flags(["--hostfile", file, *given, "scripts/train.py"]) == WITHOUT_SSH[:3]


def test_the_scripts_arguments_are_its_own(tmp_path):
    file = hostfile(tmp_path, "localhost slots=2\n")
    assert local_only_flags(["scripts/train.py", "--hostfile", file]) == ["--master_port", "4321"]
    assert local_only_flags(["--hostfile", file, "scripts/train.py", "--force_multi"]) == WITHOUT_SSH


def test_a_port_among_the_scripts_arguments_is_its_own(tmp_path):
    file = hostfile(tmp_path, "localhost slots=2\n")
    assert local_only_flags(["--hostfile", file, "scripts/train.py", "--master_port", "9"]) == WITHOUT_SSH


# secrets: tests/commands/test_trust.py has what a run writes


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_secrets_stay_out_of_other_hosts_command_lines(launcher, started, monkeypatch, tmp_path):
    for tool in ("pdsh", "ompi_info"):  # DeepSpeed looks for them
        (tmp_path / tool).write_text("#!/bin/sh\n", encoding="utf-8")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    file = hostfile(tmp_path, "node1 slots=1\nnode2 slots=1\n")
    words = ["--hostfile", file, "--no_ssh_check", "--master_addr", "10.0.0.1", "--launcher", launcher, "train.py"]
    Launcher({})._deepspeed(words)
    ((command, _),) = started
    assert "MLFLOW_TRACKING_URI=" in " ".join(command)
    assert not any("correct horse" in word for word in command)


@pytest.mark.parametrize("flags", [["--num_gpus", "2"], ["--hostfile", str(HOSTFILES / "local")]])
def test_ranks_of_this_machine_keep_their_secrets(flags, started):
    """A tracker needs its password; no command line is built that could hold it."""
    assert launch.main([*flags, "train.py"]) == 0
    ((command, env),) = started
    assert env["MLFLOW_TRACKING_PASSWORD"] == "correct horse"
    assert not any("correct horse" in word for word in command)


# --max_restarts


@pytest.mark.parametrize("given", [["--max_restarts", "3"], ["--max_restarts=3"]])
def test_max_restarts_is_the_launchers_own(given):
    own = ["--hostfile", "h", *given, "--num_gpus", "2"]
    script = ["scripts/train.py", "--max_restarts", "9"]
    assert split_command([*own, *script]) == (3, ["--hostfile", "h", "--num_gpus", "2"], script)
    assert split_command(script) == (0, [], script)


@pytest.mark.parametrize("given", [["--max_restarts", "-1"], ["--max_restarts=two"], ["--max_restarts"]])
def test_a_bad_number_of_restarts(given, capsys):
    assert launch.main([*given, "train.py"] if len(given) > 1 or "=" in given[0] else given) == 2
    assert capsys.readouterr().err.startswith("error: --max_restarts is '")


def test_restarts_without_an_output_folder_are_refused(capsys):
    assert launch.main(["--max_restarts", "1", "train.py", "--task", "CB"]) == 2
    assert "--max_restarts goes on from the checkpoints in --output_dir" in capsys.readouterr().err


class Scripted(Launcher):
    """A launcher whose attempts end with given codes."""

    def __init__(self, codes: list[int], stop_in: int = 0) -> None:
        super().__init__({})
        self.codes, self.stop_in, self.commands = codes, stop_in, []

    def attempt(self, argv):
        self.commands.append(list(argv))
        if len(self.commands) == self.stop_in:
            self.received = 15
        return self.codes[len(self.commands) - 1]


@pytest.mark.parametrize(
    ("codes", "count", "attempts"),
    [([0], 3, 1), ([2], 3, 1), ([143], 3, 1), ([137, 75, 0], 3, 3), ([137, 2], 3, 2), ([1, 1, 1], 2, 3), ([137], 0, 1)],
)
def test_attempts(tmp_path, capsys, codes, count, attempts):
    launcher, script = Scripted(codes), ["train.py", "--output_dir", str(tmp_path)]
    assert run_attempts(launcher, count, ["--num_gpus", "2"], script) == codes[-1]
    first = ["--num_gpus", "2", *script]
    assert launcher.commands == [first, *[[*first, "--resume", "auto"]] * (attempts - 1)]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == attempts - 1
    for number, line in enumerate(told, 1):
        assert line.startswith(f"restart {number} of {count}: the ranks ended with code {codes[number - 1]}; going on")


def test_a_study_is_repeated_with_its_own_arguments(tmp_path, capsys):
    launcher, script = Scripted([137, 0]), ["scripts/study.py", "study.json", "--output_dir", str(tmp_path)]
    assert run_attempts(launcher, 2, [], script) == 0
    assert launcher.commands == [script, script]
    assert capsys.readouterr().err == (
        "restart 1 of 2: the ranks ended with code 137; going on from the cells that aren't finished\n"
    )


def test_attempts_that_die_early_keep_the_checkpoint_that_was_named(tmp_path, capsys):
    """The second sets the later step aside and saves it anew, so the third goes on from that."""
    root = tmp_path / "run" / "checkpoints"
    for step in (60, 80):
        (root / f"step-{step:06d}").mkdir(parents=True)
    script = ["train.py", "--output_dir", str(tmp_path / "run"), "--resume", str(root / "step-000060")]

    class Saving(Scripted):
        def attempt(self, argv):
            if len(self.commands) == 1:
                set_aside(root, root / "step-000060", damaged=False)
                (root / "step-000080").mkdir()
            return super().attempt(argv)

    launcher = Saving([137, 137, 0])
    assert run_attempts(launcher, 3, [], script) == 0
    assert launcher.commands == [script, script, [*script, "--resume", "auto"]]
    told = [line.rsplit("going on from ")[1] for line in capsys.readouterr().err.splitlines()]
    assert told == [script[-1], "step-000080"]


def test_a_signal_to_the_launcher_ends_the_attempts(tmp_path):
    launcher = Scripted([137, 0], stop_in=1)
    assert run_attempts(launcher, 3, [], ["train.py", "--output_dir", str(tmp_path)]) == 137
    assert len(launcher.commands) == 1


@pytest.mark.parametrize(("given", "slots"), [([], None), (["--num_gpus", "2"], [0, 1])])
def test_chosen_gpus_are_left_to_each_host_at_every_attempt(given, slots, monkeypatch):
    """Without a hostfile DeepSpeed would make slots of CUDA_VISIBLE_DEVICES, or ignore it, and unset it for good."""
    seen: list[tuple[list[int], str | None]] = []

    def spawn(command, env):
        words = next(word for word in command if word.startswith("--world_info=")).split("=", 1)[1]
        seen.append((json.loads(base64.urlsafe_b64decode(words))["localhost"], env.get("CUDA_VISIBLE_DEVICES")))
        launcher._child = subprocess.Popen(["true"])
        return launcher._child

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    launcher = Launcher({})
    monkeypatch.setattr(launcher, "spawn", spawn)
    counted = list(range(get_accelerator().device_count()))
    for _ in range(2):
        assert launcher.attempt([*given, "train.py"]) == 0
    assert seen == [(slots or counted, "6,7")] * 2


def test_a_lost_host_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(restarts.on_hosts_left, "__defaults__", (lambda host, port: host != "worker-1",))
    file = hostfile(tmp_path, "worker-1 slots=2\nworker-2 slots=2\n")
    launcher = Scripted([76, 0])
    script = ["train.py", "--output_dir", str(tmp_path / "out")]
    assert run_attempts(launcher, 1, ["--hostfile", file], script) == 0
    again = launcher.commands[1]
    assert again[again.index("--include") + 1] == "worker-2:0,1"
    assert "restart 1 of 1: worker-1 can't be reached by ssh and is left out" in capsys.readouterr().err
