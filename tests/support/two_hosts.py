"""Two hosts on one machine: network, mount, process and name spaces of their own, an ssh server in each.

    with TwoHosts(folder) as hosts:
        done = hosts.run(["deepspeed", "--hostfile", str(hosts.hostfile), "scripts/train.py", ...])

The hosts share the machine's disk (folder.mkdir'ed paths are a shared disk; `hosts.local_disk` makes a host-local one),
its clock and its cores. They see each other as host1 and host2 over eth0 and nothing else: no way out. What happens in
one host's process space (pkill -f) touches no process outside.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.processes import child_environment

NAMES = ("host1", "host2")
ADDRESSES = {"host1": "10.77.0.1", "host2": "10.77.0.2"}
_TOOLS = ("unshare", "nsenter", "setpriv", "ip", "ssh", "ssh-keygen", "sshd", "pdsh")
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

_SSHD = """Port 22
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
MaxStartups 100
PidFile none
"""
_SSH = """Host *
    IdentityFile /etc/ssh/id
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    GlobalKnownHostsFile /dev/null
    LogLevel ERROR
"""
# The first process of a host. /run holds sshd's empty folder; bash as process 1 reaps what others leave behind.
_START = """set -e
hostname "$1"
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind "$2/ssh" /etc/ssh
mount --bind "$2/hosts" /etc/hosts
ip link set lo up
touch "$2/$1.up"
while :; do sleep 1000 & wait $!; done
"""


def why_not() -> str | None:
    """The reason why no hosts can be started here; None where they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "two hosts need Linux and root, for network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:{_SBIN}") is None]
    if missing:
        return f"two hosts need {', '.join(missing)} (Debian: openssh-server openssh-client pdsh iproute2)"
    spaces = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
    done = subprocess.run(
        [*spaces, "mount", "-t", "tmpfs", "none", "/run"], capture_output=True, text=True, check=False
    )
    return f"namespaces are not allowed here: {done.stderr.strip()}" if done.returncode else None


class TwoHosts:
    """See the module. hostfile: both with one slot each; env: what commands on the hosts run with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hostfile = folder / "hostfile"
        self.env = child_environment(
            {
                "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}:{_SBIN}",
                "PYTHONPATH": str(ROOT),
            }
        )
        self._unshared: dict[str, subprocess.Popen] = {}
        self._first: dict[str, int] = {}  # the number of each host's process 1, seen from outside
        self._sshd: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "TwoHosts":
        try:
            self._write_files()
            for name in NAMES:
                self._start(name)
            self._join()
            for name in NAMES:
                self.start_sshd(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends both hosts with everything that runs in them."""
        for name, process in self._unshared.items():
            if name in self._first:
                os.kill(self._first[name], signal.SIGKILL)  # a space's process 1 takes all others with it
            process.kill()
            process.wait()
        for process in self._sshd.values():
            process.wait()
        self._unshared, self._first, self._sshd = {}, {}, {}

    def _write_files(self) -> None:
        ssh, bin_folder = self.folder / "ssh", self.folder / "bin"
        ssh.mkdir(parents=True)
        bin_folder.mkdir()
        for key in ("id", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(ssh / key)]
            subprocess.run(command, check=True)
        (ssh / "sshd_config").write_text(_SSHD, encoding="utf-8")
        (ssh / "ssh_config").write_text(_SSH, encoding="utf-8")
        names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
        self.write_hostfile(1)
        launcher = bin_folder / "deepspeed"  # as scripts/setup_env.sh writes it
        launcher.write_text(f'#!/bin/sh\nexec {sys.executable} -m ptp_ds.launch "$@"\n', encoding="utf-8")
        launcher.chmod(0o755)

    def write_hostfile(self, slots: int) -> Path:
        """A hostfile with so many slots on each host."""
        self.hostfile.write_text("".join(f"{name} slots={slots}\n" for name in NAMES), encoding="utf-8")
        return self.hostfile

    def _start(self, name: str) -> None:
        spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, "bash", "-c", _START, "bash", name]
        process = subprocess.Popen([*command, str(self.folder)], env=self.env, start_new_session=True)
        self._unshared[name] = process
        ready = self.folder / f"{name}.up"
        wait_for(lambda: ready.exists() or process.poll() is not None, 20, f"{name} to start")
        assert process.poll() is None, f"{name} ended as it started"
        self._first[name] = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])

    def _join(self) -> None:
        one, two = (str(self._first[name]) for name in NAMES)
        link = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", two]
        subprocess.run(["nsenter", "--target", one, "--net", *link], env=self.env, check=True)
        for name in NAMES:
            self.must(["ip", "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0"], name)
            self.must(["ip", "link", "set", "eth0", "up"], name)

    def command(self, argv: Sequence[object], host: str = "host1") -> list[str]:
        """The command line that runs argv on a host."""
        enter = ["nsenter", "--target", str(self._first[host]), "--net", "--mount", "--uts", "--pid"]
        return [*enter, f"--wd={ROOT}", *map(str, argv)]

    def start(
        self, argv: Sequence[object], host: str = "host1", env: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """A process on a host, its output in pipes; `tell` sends it a signal."""
        return subprocess.Popen(
            self.command(argv, host), env={**self.env, **(env or {})}, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(
        self, argv: Sequence[object], host: str = "host1", env: Mapping[str, str] | None = None, timeout: float = 170
    ) -> subprocess.CompletedProcess:
        """Runs argv on a host from the repository's root and waits for it; a TimeoutExpired ends it."""
        process = self.start(argv, host, env)
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.tell(process, signal.SIGKILL)
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def must(self, argv: Sequence[object], host: str) -> str:
        """What a command printed; CalledProcessError where it failed."""
        done = self.run(argv, host, timeout=60)
        assert done.returncode == 0, f"{argv} on {host}: {done.stderr}"
        return done.stdout

    def tell(self, process: subprocess.Popen, number: int) -> None:
        """Sends a signal to a process of `start`: nsenter is its parent and passes none on."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    def processes(self, host: str, having: str) -> list[str]:
        """Command lines on a host that contain a text, without ps itself and the host's first process."""
        listed = self.must(["ps", "-ww", "-eo", "pid=,stat=,args="], host).splitlines()
        rows = [line.split(None, 2) for line in listed]
        return [row[2] for row in rows if row[0] != "1" and not row[1].startswith("Z") and having in row[2]]

    def start_sshd(self, host: str) -> None:
        """An ssh server on a host, until `stop_sshd`; its log is in <folder>/<host>.sshd."""
        log = open(self.folder / f"{host}.sshd", "a")  # noqa: SIM115 (the server's, for as long as it runs)
        command = self.command([shutil.which("sshd", path=_SBIN), "-D", "-e"], host)
        with log:
            self._sshd[host] = subprocess.Popen(command, env={"PATH": os.environ["PATH"]}, stderr=log, stdout=log)
        wait_for(lambda: self.run(["bash", "-c", f"</dev/tcp/{host}/22"], host).returncode == 0, 20, f"sshd on {host}")

    def stop_sshd(self, host: str) -> None:
        """No new connections to a host; its network stays up."""
        process = self._sshd.pop(host)
        self.tell(process, signal.SIGTERM)
        process.wait()

    def take_link_down(self, host: str) -> None:
        """The host vanishes from the network, with its processes running on."""
        self.must(["ip", "link", "set", "eth0", "down"], host)

    def bring_link_up(self, host: str) -> None:
        """The host is back."""
        self.must(["ip", "link", "set", "eth0", "up"], host)
        wait_for(lambda: self.run(["ip", "-o", "link", "show", "eth0"], host).stdout.count("state UP"), 20, "the link")

    def local_disk(self, host: str, path: Path, size: str = "64m") -> None:
        """A small disk of the host's own at path, which no other host sees; `unmount` takes it away."""
        path.mkdir(parents=True, exist_ok=True)
        self.must(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], host)

    def replace(self, host: str, path: Path, by: Path) -> None:
        """This host sees `by` in the place of the file or folder `path`, until `unmount`."""
        self.must(["mount", "--bind", by, path], host)

    def read_only(self, host: str, folder: Path) -> None:
        """This host can't write into a folder, until `unmount`."""
        self.must(["mount", "--bind", folder, folder], host)
        self.must(["mount", "-o", "remount,bind,ro", folder], host)

    def unmount(self, host: str, path: Path) -> None:
        """Takes back `local_disk`, `replace` or `read_only`."""
        self.must(["umount", path], host)


def wait_for(condition, seconds: float, what: str) -> None:
    """Waits until condition() is true; AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
