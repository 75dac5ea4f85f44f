"""The environment of what a test starts: without what this process' own process group left in os.environ."""

import os
from collections.abc import Mapping

from tests.support.paths import ROOT

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
                       "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """os.environ for a child on one core, without the launcher's variables."""
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    return {**inherited, "OMP_NUM_THREADS": "1", **(extra or {})}


def worker_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """child_environment for a script of tests/support/, which imports from `tests.support` as tests do."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return child_environment({"PYTHONPATH": os.pathsep.join(paths), **(extra or {})})
