"""Members trained together for 20 steps are those trained alone, at one's gathers; a broken one disturbs none."""

import json
import math
import subprocess
import sys

import pytest

from tests.support.paths import SUPPORT
from tests.support.processes import worker_environment


@pytest.mark.parametrize(
    ("perturbation", "stage", "nproc"),
    [
        ("pgd", "zero3", 2), ("none", "zero3", 2), ("gaussian", "zero2", 2), ("gaussian", "zero3_offload", 1),
    ],
)  # fmt: skip
@pytest.mark.slow  # in a quick run tests/commands/test_population.py stands for it, on two ranks, too
def test_members_equal_lone_runs(tmp_path, perturbation, stage, nproc):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc),
        str(SUPPORT / "population_worker.py"), perturbation, f"ds_configs/{stage}.json", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=worker_environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(nproc)]
    for report in reports:
        assert report["held"], "a step without a whole gradient moves neither prompt nor moments"
        assert report["sound"] == [True] * 3, "the loss was finite"
        assert report["poisoned"] == [[True, step != 3, True] for step in range(20)], "on every rank"
        for number, member in enumerate(report["members"]):
            assert member["moved"] > 0.1
            assert member["prompt"] < 1e-5
            assert max(member["moments"]) < 1e-5
            assert report["together_gathers"] == member["gathers"]
            for ours, theirs in (member["norms"], member["losses"]):
                assert ours == pytest.approx(theirs, rel=1e-4)
            if number == 1:
                assert not math.isfinite(member["beside a broken one"])
            else:
                assert member["beside a broken one"] < 1e-5
                assert member["beside a poisoned one"] < 1e-5
    assert reports[0]["members"][0]["prompt"] == reports[-1]["members"][0]["prompt"], "all ranks hold the same"
