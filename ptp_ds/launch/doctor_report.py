"""What scripts/doctor.py makes of the hosts' answers: faults, each with a remedy, and one table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_GB = 1e9
_SHOWN = ("torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class Fault:
    """host: "" for all of them. kind: the table's column that it marks."""

    host: str
    kind: str
    sentence: str
    remedy: str


@dataclass
class Seen:
    """A host's answer. skew: seconds that its clock is off. interface: known after the second question."""

    reply: Mapping[str, Any]
    skew: float = 0.0
    interface: str = "-"

    @property
    def report(self) -> Mapping[str, Any]:
        return self.reply["report"]


@dataclass(frozen=True)
class Limits:
    """slots: of each host in the hostfile. Sizes in GB, skew in seconds."""

    slots: Mapping[str, int]
    min_free_gb: float
    min_memory_gb: float
    max_skew: float


def most_common(values: Mapping[str, Any]) -> Any:
    """What most hosts say, the first one's where it's a tie."""
    counted = Counter(map(repr, values.values()))
    most = max(counted.values())
    return next(value for value in values.values() if counted[repr(value)] == most)


def find_faults(seen: Mapping[str, Seen], limits: Limits) -> list[Fault]:
    """All faults of the hosts that answered, those that differ from most others first."""
    if not seen:
        return []
    faults = [*_differing_versions(seen), *_differing_models(seen)]
    for host, one in seen.items():
        faults += _own_faults(host, one, limits)
    return faults


def _differing_versions(seen: Mapping[str, Seen]) -> list[Fault]:
    anew = "Set the environment up anew there (bash scripts/setup_env.sh), or use one on a shared disk."
    versions = {host: {"python": one.report["python"], **one.report["packages"]} for host, one in seen.items()}
    faults = []
    for name in next(iter(versions.values())):
        values = {host: found[name] for host, found in versions.items()}
        expected = most_common(values)
        for host, value in values.items():
            if value is None:
                faults.append(Fault(host, name, f"{host} lacks the package {name}.", anew))
            elif value != expected:
                faults.append(Fault(host, name, f"{host} has {name} {value} where others have {expected}.", anew))
    projects = {host: one.report["project"] for host, one in seen.items()}
    expected = most_common(projects)
    for host, value in projects.items():
        if value is None:
            faults.append(Fault(host, "ptp_ds", f"{host} can't import ptp_ds.", "Copy the project there."))
        elif value != expected:
            sentence = f"{host} has another version of ptp_ds ({value[:8]}, others {(expected or '-')[:8]})."
            faults.append(Fault(host, "ptp_ds", sentence, "Check out the same revision there, without local changes."))
    return faults


def _differing_models(seen: Mapping[str, Seen]) -> list[Fault]:
    models = {host: one.report["model"] for host, one in seen.items()}
    present = {host: files for host, files in models.items() if files is not None}
    if not present:
        return []  # not asked, or to be fetched by one rank a host
    expected, faults = most_common(present), []
    for host, files in models.items():
        if files is None:
            sentence = f"{host} doesn't hold the model's files, which others do."
            faults.append(Fault(host, "model", sentence, "Copy them there, or let a first run there fetch them."))
        elif files != expected:
            names = sorted(name for name in {*files, *expected} if files.get(name) != expected.get(name))
            sentence = f"{host} has other model files than the others: {', '.join(names[:3])}."
            faults.append(Fault(host, "model", sentence, "Copy the same files to every host."))
    return faults


def _own_faults(host: str, one: Seen, limits: Limits) -> list[Fault]:
    report, output, slots = one.report, one.report["output"], limits.slots[host]
    found = []
    if not report["folder"]:
        found.append(("folder", "lacks the folder that the run starts in.", "Put the project at the same path."))
    if 0 < len(report["gpus"]) < slots:
        sentence = f"has {len(report['gpus'])} GPU(s) for {slots} slots."
        found.append(("gpus", sentence, "Correct its slots= in the hostfile."))
    if report["memory"] < limits.min_memory_gb * _GB:
        sentence = f"has {report['memory'] / _GB:.1f} GB of free memory, less than {limits.min_memory_gb:g}."
        found.append(("memory", sentence, "End what else runs there, or give --min_memory_gb."))
    if abs(one.skew) > limits.max_skew:
        sentence = f"has a clock that is {abs(one.skew):.0f} s {'ahead' if one.skew > 0 else 'behind'}."
        found.append(("clock", sentence, "Start a time service there (chrony, ntpd)."))
    if output is not None and output["free"] < limits.min_free_gb * _GB:
        sentence = f"has {output['free'] / _GB:.3f} GB free in {output['folder']}, less than {limits.min_free_gb:g}."
        found.append(("output", sentence, "Make room, or give another --output_dir."))
    elif output is not None and output["error"] is not None:
        sentence = f"can't write into {output['folder']} ({output['error']})."
        found.append(("output", sentence, "Mount it writable, mend its permissions, or give another --output_dir."))
    return [Fault(host, kind, f"{host} {sentence}", remedy) for kind, sentence, remedy in found]


def connection_faults(unconnected: Mapping[str, Sequence[str]]) -> list[Fault]:
    """A fault a pair of hosts between which no TCP connection could be made; unconnected: by who tried."""
    faults = []
    for host, peers in unconnected.items():
        for peer in peers:
            sentence = f"{host} can't open a TCP connection to {peer}, although ssh reaches both."
            faults.append(Fault(host, "interface", sentence, "Open the ports above 1024 between the hosts (firewall)."))
    return faults


def table(hosts: Sequence[str], seen: Mapping[str, Seen], faults: Sequence[Fault]) -> str:
    """One row a host; a cell with a fault begins with an exclamation mark."""
    marked = {(fault.host, fault.kind) for fault in faults}
    header = ["host", "ssh", "python", *_SHOWN, "ptp_ds", "model", "gpus", "memory", "output", "interface", "clock"]
    rows = [header]
    for host in hosts:
        one = seen.get(host)
        if one is None:
            rows.append([host, "!", *["-"] * (len(header) - 2)])
            continue
        cells = {name: f"!{cell}" if (host, name) in marked else cell for name, cell in _cells(one).items()}
        rows.append([host, "ok", *(cells[name] for name in header[2:])])
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _cells(one: Seen) -> dict[str, str]:
    report, output, gpus = one.report, one.report["output"], one.report["gpus"]
    free = min((free for _, free in gpus), default=0)
    model = report["model"]
    return {
        "python": report["python"],
        **{name: report["packages"][name] or "-" for name in _SHOWN},
        "ptp_ds": (report["project"] or "-")[:8],
        "model": "-" if model is None else f"{len(model)} files",
        "gpus": f"{len(gpus)} x {gpus[0][0]}, {free / _GB:.0f} GB free" if gpus else "none",
        "memory": f"{report['memory'] / _GB:.0f} GB",
        "output": "-" if output is None else f"{output['free'] / _GB:.1f} GB",
        "interface": one.interface,
        "clock": f"{one.skew:+.0f} s" if abs(one.skew) >= 0.5 else "ok",
    }
