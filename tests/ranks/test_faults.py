"""Sentences for failing disks and lost ranks; rank 0's failure to write, known to all."""

import errno
import os
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ptp_ds.files import write_json
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.ranks.faults import (
    OutputError,
    OutputGuard,
    befell,
    disk_sentence,
    explain_code,
    is_lost_rank,
    is_stop,
)


@pytest.mark.parametrize(
    ("error", "words", "remedy"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device", "make room on that disk"),
        (OSError(errno.EROFS, "x"), "Read-only file system", "make it writable"),
        (PermissionError(errno.EACCES, "x"), "Permission denied", "make it writable"),
        (OSError(errno.EFBIG, "x"), "File too large", "ulimit -f"),
        (OSError(errno.EIO, "x"), "Input/output error", "check that disk"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left", "make room"),
        (SafetensorError("something else"), "something else", "check that disk"),
    ],
)
def test_disk_sentences(tmp_path, error, words, remedy):
    found = disk_sentence(error, tmp_path)
    assert found.startswith(f"Can't write to {tmp_path}: {words}")
    assert remedy in found


@pytest.mark.parametrize("saved", ["checkpoints/step-00000003", "members/seed-0/checkpoints/step-00000003"])
def test_a_full_disk_before_the_first_checkpoint_and_behind_it(tmp_path, saved):
    error = OSError(errno.ENOSPC, "x")
    (tmp_path / saved).parent.mkdir(parents=True)
    where = f"Can't write to {tmp_path}: No space left on device"
    assert disk_sentence(error, tmp_path) == (
        f"{where}; nothing had been saved yet: make room on that disk and start again."
    )
    (tmp_path / saved).mkdir()
    assert disk_sentence(error, tmp_path) == (
        f"{where}. What was saved before is whole: make room on that disk and go on with --resume auto."
    )


def test_safetensors_own_error_is_understood(tmp_path):
    """No fabricated text: what save_file says about a file that can't be made."""
    with pytest.raises((OSError, SafetensorError)) as caught:
        save_file({"a": torch.zeros(2)}, tmp_path / "none" / "file")
    assert disk_sentence(caught.value, tmp_path).startswith(f"Can't write to {tmp_path}: No such file or directory; ")


def test_a_failure_is_kept_and_raised_by_agree(tmp_path):
    guard = OutputGuard(Ranks(0, 1, 0, torch.device("cpu")), tmp_path)
    guard.agree()
    with guard.writing():
        raise OSError(errno.ENOSPC, "first")
    with guard.writing():
        raise OSError(errno.EROFS, "second")
    with pytest.raises(OutputError, match="No space left on device"):
        guard.agree()
    with pytest.raises(KeyError), guard.writing():
        raise KeyError("a mistake of ours passes")


class Two(Ranks):
    """Two ranks as threads of this process: host_max is a maximum over both."""

    table: dict[int, int] = {}  # noqa: RUF012
    meeting = threading.Barrier(2)

    def host_max(self, value: int) -> int:
        self.table[self.rank] = value
        self.meeting.wait(5)
        found = max(self.table.values())
        self.meeting.wait(5)
        return found


def test_all_ranks_raise_what_one_has_met(tmp_path):
    raised: dict[int, str] = {}

    def run(rank: int) -> None:
        guard = OutputGuard(Two(rank, 2, rank, torch.device("cpu")), tmp_path)
        guard.agree()
        if rank == 0:
            with guard.writing():
                raise OSError(errno.ENOSPC, "full")
        try:
            guard.agree()
        except OutputError as error:
            raised[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert "No space left on device" in raised[0]
    assert raised[1] == f"Another rank can't write to {tmp_path}; see its own line."


@pytest.mark.parametrize("resumes", [True, False])
def test_a_file_s_own_sentence_where_nothing_resumes(tmp_path, resumes):
    """What write_json raises is its sentence to an evaluation, and a failure of the run's disk to training."""
    (tmp_path / "file").write_text("")
    guard = OutputGuard(Ranks(0, 1, 0, torch.device("cpu")), tmp_path, resumes=resumes)
    with guard.writing():
        write_json(tmp_path / "file" / "new" / "below.json", {})
    wanted = "^Can't write to .*: Not a directory; nothing had been" if resumes else "below.json can't be written "
    with pytest.raises(OutputError, match=wanted):
        guard.agree()


def test_lost_ranks_are_told_from_other_errors():
    assert is_lost_rank(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:33731"))
    assert not is_lost_rank(RuntimeError("CUDA out of memory"))
    assert not is_lost_rank(ValueError("Connection closed by peer"))


def test_full_memory_is_told_from_other_errors():
    """Torch's own on a CPU is no OutOfMemoryError."""
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert befell(full.value)
    assert befell(torch.OutOfMemoryError("CUDA out of memory."))
    assert befell(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert befell(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:33731"))
    assert not befell(RuntimeError("shape '[2, 3]' is invalid for input of size 5"))


def test_stops_and_codes():
    assert [code for code in range(256) if is_stop(code)] == [130, 138, 143]
    assert explain_code(128 + 11) == "was ended by SIGSEGV"
    assert explain_code(150) != ""
    assert os.strerror(errno.ENOSPC) in disk_sentence(OSError(errno.ENOSPC, ""), "x")
