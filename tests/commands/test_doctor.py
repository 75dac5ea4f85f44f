"""scripts/doctor.py on two real hosts: nothing found on healthy ones, each planted fault found and no other."""

import subprocess
import sys
import sysconfig
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import child_environment
from tests.support.two_hosts import TwoHosts

DOCTOR = [sys.executable, str(ROOT / "scripts" / "doctor.py")]


@pytest.fixture
def doctor(hosts, tiny_model, tmp_path):
    """doctor(flags, env=...) on host1; returns the exit code, the lines and the faults among them."""

    def run(flags=("--no_collectives",), env=None):
        (tmp_path / "out").mkdir(exist_ok=True)
        words = ["--hostfile", hosts.hostfile, "--model", tiny_model, "--output_dir", tmp_path / "out", *flags]
        done = hosts.run([*DOCTOR, *words], env=env)
        lines = done.stdout.splitlines()
        return done.returncode, lines, [line for line in lines if line.startswith("fault: ")]

    return run


def copy_changed(file: Path, to: Path, old: bytes, new: bytes) -> Path:
    """A copy of a file with one thing changed."""
    content = file.read_bytes()
    assert old in content
    to.write_bytes(content.replace(old, new, 1))
    return to


def fake_python(hosts: TwoHosts, folder: Path) -> Path:
    """On host2, the interpreter says another version and reads a clock 90 s ahead. Returns the replaced file."""
    real, kept = Path(sys.executable).resolve(), folder / "real_python"
    kept.touch()
    hosts.replace("host2", kept, real)  # still there under another name
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import sys, time\nreal = time.time\ntime.time = lambda: real() + 90\nsys.version = '3.10.99 (fake)'\n"
    )
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/bash\nexport PYTHONPATH="{site}:$PYTHONPATH"\nexec -a "$0" {kept} "$@"\n')
    wrapper.chmod(0o755)
    hosts.replace("host2", real, wrapper)
    return real


@pytest.mark.slow
def test_healthy_hosts_have_no_fault_and_are_timed(doctor, hosts):
    code, lines, faults = doctor(("--mebibytes", "4"))
    assert (code, faults) == (0, []), lines
    assert lines[0].split()[:3] == ["host", "ssh", "python"]
    assert lines[0].split()[-3:] == ["output", "interface", "clock"]
    for row, host in zip(lines[1:3], ("host1", "host2"), strict=True):
        assert row.split()[:2] == [host, "ok"]
        assert "eth0" in row.split()
        assert "!" not in row
    assert lines[3].startswith("4 MiB over 2 rank(s): all-reduce ")
    assert lines[4] == "2 host(s), no fault"
    assert hosts.processes("host2", "ptp_ds") == []


@pytest.mark.slow
def test_six_planted_faults_of_one_host(doctor, hosts, tiny_model, tmp_path):
    """Another python, torch, project and model file, a clock ahead, a read-only output folder: all at once."""
    torch_info = next(Path(sysconfig.get_path("purelib")).glob("torch-*.dist-info")) / "METADATA"
    source, weights = ROOT / "ptp_ds" / "backbone" / "families.py", tiny_model / "model.safetensors"
    planted = {
        torch_info: copy_changed(torch_info, tmp_path / "METADATA", b"\nVersion: 2.", b"\nVersion: 1."),
        source: copy_changed(source, tmp_path / "families.py", b'"""', b'""" '),
        weights: copy_changed(weights, tmp_path / "weights", b"weight", b"height"),
    }
    out = tmp_path / "out"
    out.mkdir()
    with ExitStack() as undo:
        for file, changed in planted.items():
            hosts.replace("host2", file, changed)
            undo.callback(hosts.unmount, "host2", file)
        hosts.read_only("host2", out)
        undo.callback(hosts.unmount, "host2", out)
        undo.callback(hosts.unmount, "host2", tmp_path / "real_python")
        undo.callback(hosts.unmount, "host2", fake_python(hosts, tmp_path))
        code, lines, faults = doctor()
    assert code == 1
    expected = ("host2 has python 3.10.99 where", "host2 has torch 1.", "host2 has another version of ptp_ds",
                "host2 has other model files than the others: model.safetensors.", "s ahead. Start a time service",
                f"host2 can't write into {out} (Read-only file system)")  # fmt: skip
    for words in expected:
        assert sum(words in fault for fault in faults) == 1, (words, faults)
    assert len(faults) == len(expected), faults
    assert "!" not in lines[1]
    assert lines[2].count("!") == 6
    assert doctor()[0] == 0


@pytest.mark.slow
def test_a_full_disk_and_an_interface_that_is_not_there(doctor, hosts, tmp_path):
    hosts.local_disk("host2", tmp_path / "out", "1m")
    try:
        hosts.run(["dd", "if=/dev/zero", f"of={tmp_path}/out/full", "bs=64k"], "host2")
        code, _, faults = doctor(env={"GLOO_SOCKET_IFNAME": "eth9"})
    finally:
        hosts.unmount("host2", tmp_path / "out")
    assert code == 1
    assert sum(f"host2 has 0.000 GB free in {tmp_path / 'out'}" in fault for fault in faults) == 1, faults
    assert sum("GLOO_SOCKET_IFNAME=eth9 names no network interface" in fault for fault in faults) == 2, faults
    assert len(faults) == 3


@pytest.mark.slow
def test_blocked_ports(doctor, hosts):
    """ssh works; connections from one ephemeral port to another don't, as behind a firewall."""
    rule = ["ipproto", "tcp", "sport", "32768-60999", "dport", "32768-60999", "prohibit"]
    hosts.must(["ip", "rule", "add", *rule], "host2")
    try:
        code, _, faults = doctor()
    finally:
        hosts.must(["ip", "rule", "del", *rule], "host2")
    assert code == 1
    assert any("host2 can't open a TCP connection to host1, although ssh reaches both." in fault for fault in faults)


@pytest.mark.slow
def test_ssh_refused_host_down_and_no_interpreter(doctor, hosts, tmp_path):
    hosts.stop_sshd("host2")
    try:
        code, lines, (fault,) = doctor()
    finally:
        hosts.start_sshd("host2")
    assert code == 1
    assert "host2 can't be reached by ssh without a password" in fault
    assert "Connection refused" in fault
    assert lines[2].split()[:2] == ["host2", "!"]

    hosts.take_link_down("host2")
    try:
        code, _, (fault,) = doctor()
    finally:
        hosts.bring_link_up("host2")
    assert code == 1
    assert "host2 can't be reached by ssh" in fault
    assert "refused" not in fault

    nothing = tmp_path / "nothing"
    nothing.touch()
    real = Path(sys.executable).resolve()
    hosts.replace("host2", real, nothing)
    try:
        code, _, (fault,) = doctor()
    finally:
        hosts.unmount("host2", real)
    assert code == 1
    assert f"host2 has no {sys.executable}" in fault


def doctor_here(folder: Path, hostfile: str, *flags: str) -> subprocess.CompletedProcess:
    """The doctor on this machine alone, without ssh."""
    (folder / "hosts").write_text(hostfile, encoding="utf-8")
    command = [*DOCTOR, "--hostfile", str(folder / "hosts"), "--no_collectives", "--min_memory_gb", "0", *flags]
    return subprocess.run(
        command, env=child_environment(), cwd=folder, capture_output=True, text=True, timeout=100, check=False
    )


def test_this_machine_alone(tmp_path, tiny_model):
    done = doctor_here(tmp_path, "localhost slots=1\n", "--model", str(tiny_model), "--min_free_gb", "0")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "1 host(s), no fault"), done.stderr
    count = len([path for path in tiny_model.iterdir() if path.suffix != ".py"])
    assert f"{count} files" in done.stdout


def test_wrong_command_lines(tmp_path):
    done = doctor_here(tmp_path, "localhost slots=two\n")
    assert done.returncode == 2
    assert "error: Hostfile contains a bad entry: localhost slots=two" in done.stderr
    (tmp_path / "hosts").unlink()
    command = [*DOCTOR, "--hostfile", str(tmp_path / "hosts")]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        f"error: --hostfile {tmp_path / 'hosts'}: there is no such file; give a path, or a packaged one" in done.stderr
    )
