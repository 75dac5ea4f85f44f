"""Work that one process a host does while its neighbours wait, without a process group: downloads, conversions."""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptp_ds.ranks.log import ANY_RANK, get_logger

log = get_logger(__name__)


@contextmanager
def first_of_host(name: str) -> Iterator[bool]:
    """The first process of this host gets True, alone; the others wait, then all get False at once.

    name: what is prepared. The lock lies in the host's folder for temporary files, since shared disks don't all pass
    locks on. Where the first one fails, the others must look for themselves whether the work is done.
    """
    with open(_folder() / hashlib.sha256(name.encode()).hexdigest()[:32], "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            first = True
        except BlockingIOError:
            fcntl.flock(handle, fcntl.LOCK_SH)
            first = False
        yield first


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"ptp_ds-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def lock_across_hosts(path: Path) -> Iterator[None]:
    """Holds a lock on a disk that hosts may share. Where the disk has no locks it says so and goes on without: what is
    prepared must then be renamed into place at the end, so that the last host's copy is as good as the first's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            log.warning(
                "warning: %s has no file locks (%s); hosts may do the same work twice", path.parent, error.strerror,
                extra=ANY_RANK,
            )  # fmt: skip
        yield
