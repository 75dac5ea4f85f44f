"""What a host knows about itself. Imported by ranks, and sent whole over ssh to hosts that may lack this package.

Only the standard library and psutil, which DeepSpeed brings, may be imported here; the rest where a host has it.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MARK = "ptp_ds probe "  # before the answer's line: a login shell may print lines of its own
_MPI_RANK = b"OMPI_COMM_WORLD_RANK"
JOB_VARIABLE = "PTP_DS_JOB"  # in the environment of all processes of one job on several hosts


def interface_addresses() -> dict[str, list[str]]:
    """The addresses (IPv4 and IPv6, no scope) of each network interface."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.split("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def is_loopback(address: str) -> bool:
    """Whether an address never leaves its host."""
    return address.startswith("127.") or address == "::1"


def route_to(peer: str) -> dict[str, Any]:
    """How this host reaches a peer: {"address", "source", "interfaces"}, the interfaces that hold the source address.

    The kernel's routing is asked by connecting a datagram socket, which sends nothing. Raises OSError for an unknown
    name and for a peer without a route.
    """
    family, kind, protocol, _, place = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        source = probe.getsockname()[0].split("%")[0]
    names = [name for name, addresses in interface_addresses().items() if source in addresses]
    return {"address": place[0], "source": source, "interfaces": sorted(names)}


def take_port(wanted: int | None) -> int | None:
    """A free TCP port of this host: the wanted one (None where it is taken), 0: one of the system's choice, None: any.

    Ranks bind it seconds later, so any is one that the system doesn't give to outgoing connections meanwhile.
    """
    if wanted is not None:
        return _bound(wanted)
    first, last = connection_ports()
    kept = [port for port in range(10000, 65536) if not first <= port <= last]
    tries = random.SystemRandom().sample(kept, min(100, len(kept)))
    return next((port for port in tries if _bound(port)), None) or _bound(0)


def connection_ports() -> tuple[int, int]:
    """The first and the last port that the system gives to outgoing connections; Linux's usual ones elsewhere."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            first, last = map(int, file.read().split())
    except OSError:
        return 32768, 60999
    return first, last


def _bound(port: int) -> int | None:
    """The port, one of the system's choice for 0; None where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return None
        return int(probe.getsockname()[1])


def job_ranks(job: str) -> list[int]:
    """Process numbers of a job's ranks on this host: those that hold its key and a RANK, and whose parent has none."""
    ranks = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    names = dict(part.split(b"=", 1) for part in file.read().split(b"\0") if b"=" in part)
                with open(f"/proc/{entry}/stat", "rb") as file:
                    parent = int(file.read().rsplit(b")", 1)[1].split()[1])
            except OSError:
                continue  # it has ended, or is another user's
            if names.get(JOB_VARIABLE.encode()) == job.encode() and (b"RANK" in names or _MPI_RANK in names):
                ranks[int(entry)] = parent
    return sorted(number for number, parent in ranks.items() if parent not in ranks)


def signal_ranks(job: str, number: int) -> int:
    """Sends a signal to a job's ranks on this host; returns how many there were."""
    ranks = job_ranks(job)
    for rank in ranks:
        try:
            os.kill(rank, number)
        except ProcessLookupError:
            continue
    return len(ranks)


def _routes(peers: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, peer in peers.items():
        try:
            found[name] = route_to(peer)
        except OSError as error:
            found[name] = {"error": str(error)}
    return found


def host_report(asked: dict[str, Any]) -> dict[str, Any]:
    """What must agree between hosts, and what a run needs of one: versions, files, memory, disk, clock.

    asked: packages (names), model (a name or None), full_hash, output_dir (or None), folder (a run's working folder).
    """
    report: dict[str, Any] = {"folder": _enter(asked["folder"])}
    report["python"] = sys.version.split()[0]
    report["packages"] = {name: _version(name) for name in asked["packages"]}
    report["project"] = _project_hash()
    report["model"] = None if asked["model"] is None else model_hashes(asked["model"], asked["full_hash"])
    report["gpus"], report["memory"] = _gpus(), _free_memory()
    report["output"] = None if asked["output_dir"] is None else _try_output(Path(asked["output_dir"]))
    return report


def _enter(folder: str) -> bool:
    try:
        os.chdir(folder)
    except OSError:
        return False
    return True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _project_hash() -> str | None:
    """A hash over the sources of the package that a rank here would import; None where there is none."""
    spec = importlib.util.find_spec("ptp_ds")
    if spec is None or spec.origin is None:
        return None
    folder, digest = Path(spec.origin).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()


def _model_folder(name: str) -> Path | None:
    """Where a model's files are on this host, None where they aren't; fetches and converts nothing."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from ptp_ds.hosts.model_files import present_model
    except ImportError:
        return None
    return present_model(name)


def model_hashes(name: str, full: bool) -> dict[str, str] | None:
    """A hash for each file of a model; None where the host doesn't hold it.

    Files over 256 MiB by their size and 64 blocks of 1 MiB spread over them, unless `full`.
    """
    folder = _model_folder(name)
    if folder is None:
        return None
    wanted = (".json", ".safetensors", ".model", ".txt", ".jinja")
    return {file.name: _hash(file, full) for file in sorted(folder.iterdir()) if file.name.endswith(wanted)}


def _hash(file: Path, full: bool) -> str:
    size, block = file.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as handle:
        if full or size <= 256 * block:
            while data := handle.read(block):
                digest.update(data)
        else:
            for number in range(64):
                handle.seek(number * (size - block) // 63)
                digest.update(handle.read(block))
    return digest.hexdigest()


def _gpus() -> list[list[Any]]:
    """Name and free bytes of each NVIDIA GPU, none where there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return [[name.strip(), int(free) << 20] for name, free in rows]


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _try_output(path: Path) -> dict[str, Any]:
    """Free bytes, and whether a MiB can be written there; the error's text where it can't."""
    folder = nearest_folder(path)
    found: dict[str, Any] = {"folder": str(folder), "free": shutil.disk_usage(folder).free, "error": None}
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ptp_ds_doctor") as file:
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found["error"] = os.strerror(error.errno) if error.errno else str(error)
    return found


def try_connections(key: str, own: str, port: int, peers: dict[str, list[Any]], seconds: float) -> list[str]:
    """Names of the peers {name: [address, port]} to which no TCP connection could be made within the time.

    All hosts are asked this at once: each listens at its own port until all peers have come, or the time is over.
    """
    heard: set[str] = set()
    end = time.monotonic() + seconds
    listener = threading.Thread(target=_listen, args=(key, port, set(peers), heard, end), daemon=True)
    listener.start()
    missing = dict(peers)
    while missing and time.monotonic() < end:
        for name in [name for name, place in missing.items() if _greets(key, own, place)]:
            del missing[name]
        time.sleep(0.1)
    listener.join()
    return sorted(missing)


def _listen(key: str, port: int, peers: set[str], heard: set[str], end: float) -> None:
    with socket.create_server(("", port), backlog=1024) as server:
        while not peers <= heard and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(2)
                    connection.sendall(key.encode())
                    heard.add(connection.recv(1000).decode(errors="replace"))
            except OSError:  # nobody came, or one broke off
                continue


def _greets(key: str, own: str, place: list[Any]) -> bool:
    try:
        with socket.create_connection((place[0], place[1]), timeout=2) as connection:
            connection.sendall(own.encode())
            return connection.recv(100) == key.encode()
    except OSError:
        return False


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The reply to a request: its keys choose what is asked.

    peers {name: address}: routes to them. port: see take_port. signal [job, number].
    report: see host_report. connect [key, own name, port, peers, seconds]: see try_connections.
    """
    reply: dict[str, Any] = {"host": socket.gethostname()}
    if "peers" in request:
        reply["routes"] = _routes(request["peers"])
        reply["interfaces"] = interface_addresses()
    if "port" in request:
        reply["port"] = take_port(request["port"])
    if "signal" in request:
        reply["ranks"] = signal_ranks(*request["signal"])
    if "report" in request:
        reply["report"] = host_report(request["report"])
    if "connect" in request:
        reply["unconnected"] = try_connections(*request["connect"])
    reply["time"] = time.time()
    return reply


if __name__ == "__main__":
    print(MARK + json.dumps(answer(json.loads(sys.argv[1]))), flush=True)  # noqa: T201  (what `ask` reads)
