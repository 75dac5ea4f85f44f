"""One process a host prepares, the others wait: with real processes, real locks, and a disk without any."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from ptp_ds.hosts import model_files
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.models import source as models
from ptp_ds.models.source import _move_into_place, resolve_model
from ptp_ds.ranks import once
from ptp_ds.ranks.once import first_of_host, lock_across_hosts
from tests.support.processes import child_environment

# Each of four forks notes when it begins to prepare, and what it sees in the end. Prints their exit codes.
WORKER = """
import os, sys, time
from pathlib import Path
from ptp_ds.launch.job import end_fork
from ptp_ds.models import source as models

def convert(target):
    with open(sys.argv[1] + "/began", "a") as log:
        log.write("began\\n")
    time.sleep(0.8)
    if sys.argv[2] == "fails" and not Path(sys.argv[1] + "/failed").exists():
        Path(sys.argv[1] + "/failed").touch()
        raise ValueError("the first one fails")
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")

def ask():
    folder = models.resolve_model("smollm2-135m")
    assert (folder / "config.json").read_text() == "{}"

models._convert_embedded = convert
forks = []
for _ in range(4):
    forks.append(os.fork())
    if not forks[-1]:
        end_fork(ask)
print(*sorted(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks))
"""


def start(folder: Path, how: str) -> list[int]:
    """Exit codes of four processes that all ask for the model at once."""
    env = child_environment({"PTP_DS_CACHE": str(folder / "cache"), "TMPDIR": str(folder)})
    command = [sys.executable, "-c", WORKER, str(folder), how]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60, check=True)
    return list(map(int, done.stdout.split()))


def test_one_of_four_processes_converts(tmp_path):
    assert start(tmp_path, "works") == [0, 0, 0, 0]
    assert (tmp_path / "began").read_text() == "began\n"


@pytest.mark.slow
def test_where_the_first_one_fails_the_next_takes_over(tmp_path):
    assert start(tmp_path, "fails") == [0, 0, 0, 1]
    assert (tmp_path / "began").read_text() == "began\nbegan\n"


@pytest.fixture
def _own_locks(monkeypatch, tmp_path):
    monkeypatch.setattr(once.tempfile, "gettempdir", lambda: str(tmp_path))


@pytest.mark.usefixtures("_own_locks")
def test_the_first_is_alone_and_other_names_are_free():
    with first_of_host("a") as first:
        assert first
        with first_of_host("b") as other:
            assert other
    with first_of_host("a") as again:
        assert again


@pytest.mark.usefixtures("_own_locks")
def test_a_disk_without_locks_is_said_and_used(monkeypatch, tmp_path, capsys):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_across_hosts(tmp_path / "cache" / "model.lock"):
        pass
    assert f"warning: {tmp_path / 'cache'} has no file locks (No locks available)" in capsys.readouterr().err


def test_the_slower_hosts_copy_gives_way(tmp_path):
    """Two hosts without a common lock both converted: the folder that is there stays whole."""
    work, target = tmp_path / "work", tmp_path / "target"
    for folder, text in ((work, "mine"), (target, "theirs")):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    _move_into_place(work, target)
    assert (target / "config.json").read_text() == "theirs"
    (target / "config.json").rename(target / "other")
    with pytest.raises(OSError, match=r"not empty"):
        _move_into_place(work, target)


@pytest.mark.usefixtures("_own_locks")
def test_a_model_that_is_there_is_not_converted(monkeypatch, tmp_path):
    monkeypatch.setenv("PTP_DS_CACHE", str(tmp_path))
    target = model_files.embedded_folder()
    assert model_files.present_model(EMBEDDED_MODEL) is None
    target.mkdir()
    (target / "config.json").write_text("{}")
    monkeypatch.setattr(models, "_convert_embedded", lambda folder: pytest.fail("converted again"))
    assert resolve_model(EMBEDDED_MODEL) == model_files.present_model(EMBEDDED_MODEL) == target
    assert model_files.present_model(str(tmp_path)) == tmp_path
    assert model_files.present_model("nobody/no-such-model") is None
