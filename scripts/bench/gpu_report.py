"""What scripts/gpu_check.sh leaves: gpu_check.json, whole behind every part, and the table at the end."""

import datetime
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_parts import BY_NAME

_TAIL = 15  # lines of a failed part's output that the report keeps
_ASK = """
import json, torch
from ptp_ds.adapters.record import versions
count = torch.cuda.device_count()
print(json.dumps({"gpus": count, "gpu": torch.cuda.get_device_name() if count else None, "memory_bytes":
    torch.cuda.get_device_properties(0).total_memory if count else None, "versions": versions()}))
"""


def machine(python: str, env: Mapping[str, str]) -> dict[str, Any]:
    """GPUs and versions, asked in a process of its own: this one must hold no memory of the device."""
    done = subprocess.run([python, "-c", _ASK], env=dict(env), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {python} has no torch and ptp_ds to check:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The rows of a part's file, whatever its script wraps around them; none where there is no file."""
    if not file.is_file():
        return []
    value = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(value, list):
        return value
    if "scores" in value:  # compare_precision.py
        return [{"precision": name, "scores": scores} for name, scores in value["scores"].items()]
    return value["rows"]


def write_report(out: Path, about: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> None:
    """gpu_check.json: the machine, and each part's status, rows and, where it failed, the end of its output."""
    parts = {}
    for name, outcome in found.items():
        parts[name] = {"asks": BY_NAME[name].asks, **outcome, "rows": []}
        log = out / f"{name}.log"
        if outcome["status"].startswith("not run"):
            continue
        parts[name]["rows"] = rows_of(out / f"{name}.json")
        if outcome.get("exit_code") != 0 and log.is_file():
            parts[name]["output"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    report = {"date": datetime.datetime.now().isoformat(timespec="seconds"), **about, "parts": parts}
    work = out / ".gpu_check.json.writing"
    work.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    work.replace(out / "gpu_check.json")


def shown(name: str, value: Any) -> str:
    """One value of the table, with its unit."""
    label = name.removesuffix("_bytes").removesuffix("_seconds")
    if isinstance(value, dict):
        return f"{name} " + " ".join(f"{key}={shown('', one).strip()}" for key, one in value.items())
    if isinstance(value, list):
        return f"{name} " + " ".join(shown("", one).strip() for one in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{label} {value}"
    if name.endswith("_bytes"):
        return f"{label} {value / 2**30:.2f} GiB" if value >= 2**30 else f"{label} {value / 2**20:.1f} MiB"
    if name.endswith("_seconds"):
        return f"{label} {value:.3f} s" if value >= 1 else f"{label} {1e3 * value:.1f} ms"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{label} {value:.0f}"
    return f"{label} {value:.3g}"


def line_of(row: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    """One row of the table: its case, then its columns, an error, or why there is no number."""
    if "error" in row and isinstance(row["error"], str):
        return f"{row.get('case', '')}: FAILED {row['error']}"
    if "absent" in row:
        return f"{row.get('case', '')}: {row['absent']}"
    values = [shown(name, row[name]) for name in columns if row.get(name) is not None]
    return ": ".join(filter(None, [row.get("case", ""), ", ".join(values)]))


def table(report: Mapping[str, Any]) -> str:
    """All of a report as text, a part below the other."""
    parts, revision = report["parts"], report["versions"]["git_revision"]
    lines = [
        "",
        f"{report['date']}  {report['gpus']} x {report['gpu']}  torch {report['versions']['torch']}  {revision}",
    ]
    if report["dry"]:
        lines.append("a dry run, of tiny random models on a CPU: its times and rates say nothing of a GPU")
    for name, part in parts.items():
        took = f", {part['seconds']:.0f} s" if "seconds" in part else ""
        lines.append(f"{name} [{part['status']}{took}] {part['asks']}")
        lines += [f"    {line_of(row, tuple(BY_NAME[name].columns))}" for row in part["rows"]]
        lines += [f"    | {line}" for line in part.get("output", [])]
    counts: dict[str, list[str]] = {}
    for name, part in parts.items():
        counts.setdefault(part["status"], []).append(name)
    lines.append("; ".join(f"{status}: {' '.join(names)}" for status, names in counts.items()))
    return "\n".join(lines)
