"""The environment of a run started by a test: without what this process' own process group left in os.environ."""

import os
from collections.abc import Mapping

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
                       "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """os.environ for a child on one core, without the launcher's variables."""
    inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    return {**inherited, "OMP_NUM_THREADS": "1", **(extra or {})}
