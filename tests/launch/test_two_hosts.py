"""The real command on two hosts of one machine (tests/support/two_hosts.py): results, signals, launch lines."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptp_ds.tasks.data import DEMO_DATA
from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.two_hosts import NAMES, TwoHosts, wait_for

pytestmark = [pytest.mark.slow]
ZERO3 = ["scripts/train.py", "--ds_config", "ds_configs/zero3.json"]
STEPS = ["--task", "COPA", "--max_steps", "4", "--log_every", "1", "--batch_size", "8", "--prompt_length", "5",
         "--eval_tokens", "600"]  # fmt: skip
ENDLESS = ["--task", "COPA", "--max_steps", "100000", "--log_every", "1", "--batch_size", "8", "--eval_every", "0",
           "--save_every", "0"]  # fmt: skip


def curve(folder: Path) -> tuple[torch.Tensor, dict]:
    """The losses of each step, and result.json."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    losses = torch.tensor([line["loss"] for line in lines if line["kind"] == "train"])
    return losses, json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def one_host(tmp_path_factory, tiny_model):
    """The same run, two ranks on one host, by torchrun."""
    folder = tmp_path_factory.mktemp("one-host")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, *ZERO3, "--model", tiny_model, *STEPS, "--output_dir", folder / "out"],
        cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return curve(folder / "out")


def same(found: tuple[torch.Tensor, dict], expected: tuple[torch.Tensor, dict]) -> None:
    losses, result = found
    assert losses.shape == (4,)
    torch.testing.assert_close(losses, expected[0], atol=1e-5, rtol=1e-5)
    assert result["world_size"] == expected[1]["world_size"] == 2
    assert result["metrics"] == expected[1]["metrics"]
    assert abs(result["eval_cross_entropy"] - expected[1]["eval_cross_entropy"]) < 1e-5


def test_the_readmes_command_on_two_hosts_gives_one_hosts_result(hosts, tiny_model, one_host, tmp_path):
    command = ["deepspeed", "--hostfile", hosts.hostfile, *ZERO3, "--model", tiny_model, *STEPS]
    done = hosts.run([*command, "--output_dir", tmp_path / "out"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 host(s), master host1 at 10.77.0.1:" in done.stdout
    assert "over eth0" in done.stdout
    same(curve(tmp_path / "out"), one_host)
    for host in ("host1", "host2"):
        assert hosts.processes(host, "train.py") == []


def left(hosts: TwoHosts) -> list[str]:
    """Processes of a run that are still there, on either host."""
    words = ("scripts/train.py", "pdsh", "deepspeed.launcher", "ptp_ds.launch.node")
    return [line for host in ("host1", "host2") for word in words for line in hosts.processes(host, word)]


@pytest.mark.parametrize(("number", "slots"), [(signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_to_the_launcher_stops_all_ranks_and_leaves_none(hosts, tiny_model, tmp_path, number, slots):
    """Another job of the same user on host2 stays: DeepSpeed's own answer would end it."""
    out = tmp_path / "out"
    name = hosts.env["PATH"].split(":")[1] + "/python -u -m deepspeed.launcher.launch"
    other = hosts.start(["bash", "-c", f"exec -a '{name}' sleep 170"], "host2")
    hosts.write_hostfile(slots)
    try:
        command = ["deepspeed", "--hostfile", hosts.hostfile, *ZERO3, "--model", tiny_model, *ENDLESS]
        run = hosts.start([*command, "--output_dir", out])
        log = out / "log.jsonl"
        wait_for(lambda: (log.exists() and log.stat().st_size > 500) or run.poll() is not None, 90, "some steps")
        hosts.tell(run, number)
        printed, errors = run.communicate(timeout=60)
        assert run.returncode >= 128, (printed[-2000:], errors[-2000:])
        assert f"stopped by signal {int(number)} after step" in printed
        assert len(list((out / "checkpoints").glob("step-*"))) == 1
        assert hosts.processes("host2", name)  # the other job
        hosts.tell(other, signal.SIGKILL)
        other.communicate()
        assert left(hosts) == []
    finally:
        other.kill()
        hosts.write_hostfile(1)


def test_a_host_that_is_away_is_named_before_anything_starts(hosts, tiny_model, tmp_path):
    hosts.stop_sshd("host2")
    try:
        command = ["deepspeed", "--hostfile", hosts.hostfile, *ZERO3, "--model", tiny_model, *STEPS]
        done = hosts.run([*command, "--output_dir", tmp_path / "out"])
    finally:
        hosts.start_sshd("host2")
    assert done.returncode == 2
    assert "error: host2 can't be reached by ssh without a password" in done.stderr
    assert not (tmp_path / "out").exists()


def test_torchrun_on_each_host(hosts, tiny_model, one_host, tmp_path):
    launcher = ["torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint",
                "host1:29400", *ZERO3]  # fmt: skip
    runs = [
        hosts.start([*launcher, "--model", tiny_model, *STEPS, "--output_dir", tmp_path / "out"], host)
        for host in ("host1", "host2")
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors[-3000:]
    same(curve(tmp_path / "out"), one_host)


def test_openmpi(hosts, tiny_model, one_host, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun here (Debian: openmpi-bin)")
    network = "--allow-run-as-root --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0"
    launcher = ["deepspeed", "--hostfile", hosts.hostfile, "--launcher", "openmpi", "--launcher_args", network]
    done = hosts.run([*launcher, *ZERO3, "--model", tiny_model, *STEPS, "--output_dir", tmp_path / "out"])
    assert done.returncode == 0, done.stderr[-3000:]
    same(curve(tmp_path / "out"), one_host)


def test_hosts_with_disks_of_their_own_must_hold_the_same_data(hosts, tiny_model, tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    shutil.copytree(DEMO_DATA / "COPA", data / "COPA")
    shutil.copytree(data, other)
    rows = (other / "COPA" / "train.jsonl").read_text().splitlines(keepends=True)
    (other / "COPA" / "train.jsonl").write_text("".join(rows[1:]))
    hosts.replace("host2", data, other)
    try:
        command = ["deepspeed", "--hostfile", hosts.hostfile, *ZERO3, "--model", tiny_model, *STEPS]
        done = hosts.run([*command, "--data_dir", data, "--output_dir", tmp_path / "out"])
    finally:
        hosts.unmount("host2", data)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Rank 1 of 2 sees another version of the train split's rows than rank 0 does" in done.stderr
    assert not (tmp_path / "out").exists()


def test_models_are_prepared_once_a_disk(hosts, tmp_path):
    """Two processes a host. A shared cache is filled once, host-local ones once each."""
    log, temporary = tmp_path / "log", tmp_path / "temporary"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom ptp_ds.models import source as models\n"
        "def convert(target):\n    open(sys.argv[1], 'a').write('began\\n')\n    time.sleep(2)\n"
        "    target.mkdir(parents=True)\n    (target / 'config.json').write_text('{}')\n"
        "models._convert_embedded = convert\nmodels.resolve_model('smollm2-135m')\n"
    )
    for host in NAMES:  # locks of a host's own, as on two real machines
        hosts.local_disk(host, temporary)
    try:
        for cache, expected in ((tmp_path / "shared", 1), (temporary / "own", 2)):
            log.write_text("")
            env = {"PTP_DS_CACHE": str(cache), "TMPDIR": str(temporary)}
            runs = [hosts.start([sys.executable, "-c", code, log], host, env) for host in (*NAMES, *NAMES)]
            assert [run.wait(60) for run in runs] == [0, 0, 0, 0]
            for run in runs:
                run.communicate()
            assert log.read_text() == "began\n" * expected, cache
    finally:
        for host in NAMES:
            hosts.unmount(host, temporary)
