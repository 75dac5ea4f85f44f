"""scripts/quickstart.sh: two ranks, or one where there is a single GPU; all it calls is played."""

import os
import shutil
import subprocess

import pytest

from tests.support.paths import ROOT


@pytest.mark.parametrize(("gpus", "ranks"), [(None, "2"), (0, "2"), (1, "1"), (2, "2"), (8, "2")])
def test_a_rank_a_gpu(tmp_path, gpus, ranks):
    """gpus: those that torch counts; None for a machine without nvidia-smi."""
    played = {
        "scripts/setup_env.sh": "", ".venv/bin/python": f"echo {gpus}", ".venv/bin/deepspeed": 'echo "$@"',
        **({} if gpus is None else {".venv/bin/nvidia-smi": ""}),
    }  # fmt: skip
    for name, text in played.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    path = os.pathsep.join(
        one for one in os.environ["PATH"].split(os.pathsep) if not shutil.which("nvidia-smi", path=one)
    )
    done = subprocess.run(["bash", tmp_path / "scripts" / "quickstart.sh", "--seed", "1"], env={"PATH": path},
                          capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    words = done.stdout.split()
    assert words[words.index("--num_gpus") + 1] == ranks
    assert words[-2:] == ["--seed", "1"]
