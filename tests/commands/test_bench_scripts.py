"""The benchmarks start, and bench_step's sides do the same work: a change of names elsewhere must not end them."""

import json

import pytest

from tests.support.paths import ROOT
from tests.support.zygote import run_script

BENCH = ROOT / "scripts" / "bench"
SCRIPTS = sorted(file.name for file in BENCH.glob("*.py") if "ArgumentParser(" in file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_explains_itself(name, tmp_path):
    done = run_script(BENCH / name, ["--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_a_step_of_every_side_in_both_precisions(tiny_model, tmp_path):
    """bench_step itself refuses sides whose first losses differ."""
    arguments = ["--model", tiny_model, "--tasks", "Reviews", "--rows", 2, "--prompt_lengths", 3, "--pairs", 1,
                 "--methods", "none", "pgd", "--json", "table.json", "--data_dir", ""]  # fmt: skip
    done = run_script(BENCH / "bench_step.py", arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert [(row["dtype"], row["method"]) for row in rows] == [
        ("float32", "none"), ("bfloat16", "none"), ("float32", "pgd"), ("bfloat16", "pgd")
    ]  # fmt: skip
    for row in rows:
        assert row["ratio_fastest"] <= row["ratio_peft_keep"] + 1e-9
        assert row["ratio_peft_keep_fp32"] > 0
        assert row["share_of_peft_keep_without_regulariser"] > 0


def test_a_large_step_beside_pefts(tmp_path):
    arguments = ["--shape", "tiny", "--rows", 4, "--peft_rows", 2, "--prompt_length", 3, "--steps", 1,
                 "--json", "large"]  # fmt: skip
    done = run_script(BENCH / "bench_large.py", arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "large").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == ["none", "gaussian", "pgd"]
    for row in rows:
        assert row["ratio_peft_keep"] > 0
        assert row["rate_share"] > 0


def test_a_profile_tells_parts_and_operators(tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--task", "Reviews", "--rows", 2, "--prompt_lengths", 3, "--data_dir", "",
                 "--operators", 5]  # fmt: skip
    done = run_script(BENCH / "profile_step.py", arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    tables = [table for table in done.stdout.split("\n\n") if ", prompt 3, pgd, 2 rows" in table]
    assert [table.strip().split(",")[0] for table in tables] == ["float32", "bfloat16"]
    for table in tables:
        parts = dict(line.rsplit(None, 2)[:2] for line in table.splitlines() if line.endswith(" s"))
        seconds = {name.strip(): float(value) for name, value in parts.items()}
        assert seconds["everything else"] >= 0, "nothing is counted twice"
        assert table.count(" calls") == 5
