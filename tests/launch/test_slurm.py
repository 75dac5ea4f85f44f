"""scripts/slurm.sbatch with stand-ins for srun and scontrol: what is started, and when the job is put back."""

import os
import subprocess

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "scripts" / "slurm.sbatch"
SRUN = """#!/bin/bash
[ "$1" = --wait=120 ] || exit 99
shift
echo "${SRUN_CPUS_PER_TASK:-none}" > cpus
for rank in 0 1 2 3; do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % 2)) "$@" || code=$?
done
exit ${code:-0}
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") printf 'node1\\nnode2\\n' ;;
*) echo "$@" >> requeued ;;
esac
"""
PYTHON = """#!/bin/bash
echo "$RANK $LOCAL_RANK $LOCAL_WORLD_SIZE $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> ranks
exit ${EXIT:-0}
"""


@pytest.fixture
def sbatch(tmp_path):
    """sbatch(arguments, exit code of the ranks): the script with the variables that Slurm sets."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", PYTHON)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]",
             "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "6"}  # fmt: skip

    def run(arguments, code=0):
        env = {"PATH": f"{tools}:{os.environ['PATH']}", **slurm, "EXIT": str(code)}
        return subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True, check=False)

    return run


def test_each_task_is_a_rank(sbatch, tmp_path):
    done = sbatch(["--task", "CB", "--output_dir", "runs/my run"])
    assert done.returncode == 0, done.stderr
    arguments = "scripts/train.py --ds_config ds_configs/zero3.json --resume auto --task CB --output_dir runs/my run"
    assert (tmp_path / "ranks").read_text().splitlines() == [
        f"{rank} {rank % 2} 2 4 node1 23456 {arguments}" for rank in range(4)
    ]
    assert (tmp_path / "cpus").read_text() == "6\n"
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "requeued"), [(138, True), (143, False), (1, False), (2, False)])
def test_only_a_job_that_slurm_warned_is_put_back(sbatch, tmp_path, code, requeued):
    done = sbatch(["--output_dir=runs/cb"], code)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() is requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 123456\n"


def test_an_output_folder_is_asked_for(sbatch, tmp_path):
    done = sbatch(["--task", "CB"])
    assert done.returncode == 2
    assert "error: give --output_dir" in done.stderr
    assert not (tmp_path / "ranks").exists()
