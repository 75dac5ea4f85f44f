"""Environment variables that the package sets for itself: behind the last call from a program they are taken back.

They alone: a call that put the whole environment back would delete what the program's other threads set meanwhile, and
what a training in one of them needs.
"""

import os
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager


class OwnVariables(MutableMapping[str, str]):
    """os.environ. What is set through it while calls from a program are inside is noted, and taken back behind them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._calls = 0
        self._noted: dict[str, tuple[str | None, str]] = {}  # (before, None for unset, and ours) by name

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """A call from a program, in any thread; the last one to leave takes back what is still as it was set here."""
        with self._lock:
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._take_back()

    def _take_back(self) -> None:
        for name, (before, ours) in self._noted.items():
            if os.environ.get(name) != ours:  # the program has set it since
                continue
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
        self._noted = {}

    def __getitem__(self, name: str) -> str:
        return os.environ[name]

    def __setitem__(self, name: str, value: str) -> None:
        with self._lock:
            if self._calls:
                before = self._noted[name][0] if name in self._noted else os.environ.get(name)
                self._noted[name] = (before, value)
            os.environ[name] = value

    def __delitem__(self, name: str) -> None:
        del os.environ[name]

    def __iter__(self) -> Iterator[str]:
        return iter(os.environ)

    def __len__(self) -> int:
        return len(os.environ)


OWN_VARIABLES = OwnVariables()
