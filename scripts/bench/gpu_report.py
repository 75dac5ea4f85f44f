#!/usr/bin/env python
"""Joins what scripts/gpu_check.sh left in a folder into gpu_check.json and prints it as a table."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ptp_ds.adapters.record import versions


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main(folder: Path) -> int:
    codes = dict(line.split() for line in (folder / "exit_codes.txt").read_text().splitlines())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    report = {
        "date": datetime.date.today().isoformat(), "gpu": name, "versions": versions(), "exit_codes": codes,
        "bench": read(folder / "bench.json"), "train": read(folder / "train" / "result.json"),
        "llama8b": read(folder / "llama8b.json"), "kernels": read(folder / "kernels.json"),
        "attention": read(folder / "attention.json"), "precision": read(folder / "precision.json"),
    }  # fmt: skip
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"\n{report['date']}  {name}  torch {torch.__version__}  exit codes {codes}")
    for row in (report["kernels"] or {}).get("rows", []):
        compiled = row.get("compiled_over_triton", float("nan"))
        print(f"kernel {row['kernel']:24} {row['triton_ms']:.3f} ms, {row['bandwidth_share']:.2f} of copy, "
              f"eager {row['eager_over_triton']:.1f}x, compiled {compiled:.1f}x")  # fmt: skip
    for row in (report["attention"] or {}).get("rows", []):
        print(f"attention {row['tokens']} tokens, {row['branches']} branches: ours {row['ours']:.2f} ms, reference "
              f"{row['reference']:.2f}, flex {row['flex']:.2f}")  # fmt: skip
    for name, scores in ((report["precision"] or {}).get("scores", {})).items():
        print(f"precision {name}: scores {' '.join(f'{score:.3f}' for score in scores)}")
    for row in report["bench"] or []:
        if "time_ratio" in row:
            print(f"      {row['activations']:9} {row['packed_tokens']} tokens, peak {row['peak_ratio']:.2f} of keep, "
                  f"time {row['time_ratio']:.2f}")  # fmt: skip
            continue
        print(f"step {row['task']:6} rows {row['rows']:3} prompt {row['prompt_length']:3} {row['method']:9} "
              f"{row['ours_seconds'] * 1e3:8.1f} ms a/ours {row['ratio_peft']:.2f} b/ours {row['ratio_peft_keep']:.2f} "
              f"floor {row['floor_share']:.2f}")  # fmt: skip
    if report["train"]:
        train = report["train"]
        print(f"train {train['task']} metrics {train['metrics']} majority {train['majority']:.3f} "
              f"{train['tokens_per_second']:.0f} tok/s")  # fmt: skip
    for row in (report["llama8b"] or {}).get("rows", []):
        print(f"8B    {row['method']:9} {row['step_seconds']:.3f} s/step  {row['tokens_per_second']:.0f} tok/s  "
              f"{row['peak_bytes'] / 2**30:.1f} GiB  matrix rate used {row['rate_share']:.2f}  "
              f"b/ours {row['ratio_peft_keep'] or float('nan'):.2f}")  # fmt: skip
    return 0 if all(code == "0" for code in codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
