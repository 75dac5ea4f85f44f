"""The launcher: which hosts a hostfile names, and when ssh is left out."""

import socket
from pathlib import Path

import pytest

from ptp_ds import launch
from ptp_ds.launch import hosts_of, local_only_flags

HOSTFILES = Path(__file__).parent.parent / "hostfiles"


@pytest.fixture(autouse=True)
def _port(monkeypatch):
    monkeypatch.setattr(launch, "free_port", lambda: 4321)


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


def test_no_hostfile():
    assert local_only_flags(["scripts/train.py"]) == []
    assert local_only_flags(["--hostfile", "no-such-file", "scripts/train.py"]) == []
    assert local_only_flags(["--hostfile"]) == []


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
    assert local_only_flags(["scripts/train.py", "--hostfile", file]) == []
    assert local_only_flags(["--hostfile", file, "scripts/train.py", "--force_multi"]) == WITHOUT_SSH


def test_a_port_among_the_scripts_arguments_is_its_own(tmp_path):
    file = hostfile(tmp_path, "localhost slots=2\n")
    assert local_only_flags(["--hostfile", file, "scripts/train.py", "--master_port", "9"]) == WITHOUT_SSH
