"""The benchmarks start, and bench_step's sides do the same work: a change of names elsewhere must not end them."""

import json
import re

import pytest
from curves import RULES, Point

from tests.support.paths import ROOT
from tests.support.zygote import run_script

BENCH = ROOT / "scripts" / "bench"
STARTS = re.compile(r"(ArgumentParser|part_parser)\(.*__name__ ==", re.DOTALL)
SCRIPTS = sorted(file.name for file in BENCH.glob("*.py") if STARTS.search(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_explains_itself(name, tmp_path):
    done = run_script(BENCH / name, ["--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


@pytest.mark.slow
def test_a_step_of_every_side_in_both_precisions(tiny_model, tmp_path):
    """bench_step itself refuses sides whose first losses differ."""
    arguments = ["--model", tiny_model, "--tasks", "Reviews", "--rows", 2, "--prompt_lengths", 3, "--pairs", 1,
                 "--methods", "none", "pgd", "--json", "table.json", "--data_dir", "",
                 "--joint"]  # fmt: skip
    done = run_script(BENCH / "bench_step.py", arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prompt 3: one for q_proj+k_proj+v_proj (2 times), gate_proj+up_proj (2 times)" in done.stdout
    rows = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert [(row["dtype"], row["method"]) for row in rows] == [
        ("float32", "none"), ("bfloat16", "none"), ("float32", "pgd"), ("bfloat16", "pgd")
    ]  # fmt: skip
    for row in rows:
        assert row["ratio_fastest"] <= row["ratio_peft_keep"] + 1e-9
        assert row["ratio_peft_keep_fp32"] > 0
        assert row["share_of_peft_keep_without_regulariser"] > 0


@pytest.fixture
def study(tiny_model, tmp_path, write_rows):
    """A file of one task, two methods, two seeds on draws of their own."""
    for split, thing in (("few-13", "film"), ("few-21", "book"), ("dev", "play"), ("val", "song")):
        rows = [{"review": f"a {word} {thing}", "label": label, "idx": place}
                for place, (word, label) in enumerate([("fine", "positive"), ("dull", "negative")] * 4)]  # fmt: skip
        write_rows(tmp_path / "data" / "Reviews" / f"{split}.jsonl", rows)
    value = {
        "flags": {"model": str(tiny_model), "max_steps": 4, "eval_every": 2, "prompt_length": 3},
        "tasks": {"R": {"task": "Reviews", "data_dir": "data", "train_split": "few-{draw}", "select_split": "dev"}},
        "methods": {"plain": {"perturbation": "none"}, "noise": {"sigma": 1}}, "seeds": [0, 1], "draws": [13, 21],
    }  # fmt: skip
    (tmp_path / "study.json").write_text(json.dumps(value), encoding="utf-8")
    return tmp_path / "study.json"


@pytest.mark.slow
def test_curves_train_what_is_missing(study, tmp_path):
    done = run_script(BENCH / "curves.py", [study, "--out", "out", "--json", "table"], tmp_path)
    assert done.returncode == 0, done.stderr
    files = {f"R-{method}-{seed}.json" for method in ("plain", "noise") for seed in (0, 1)}
    records = {file: json.loads((tmp_path / "out" / file).read_text(encoding="utf-8")) for file in files}
    for file, record in records.items():
        assert [point[0] for point in record["curve"]] == [2, 4]
        best = next(point for point in record["curve"] if point[0] == record["result"]["best_step"])
        assert best[1] == record["result"]["select_metrics"]["accuracy"]
        assert best[3] == record["result"]["metrics"]["accuracy"], "the rule of a run is the table's first"
        assert record["settings"]["train_split"] == f"few-{(13, 21)[record['settings']['seed']]}", file
    assert records["R-plain-0.json"]["curve"] != records["R-plain-1.json"]["curve"]
    (tmp_path / "out" / "R-noise-1.json").unlink()
    before = (tmp_path / "out" / "R-plain-0.json").stat().st_mtime_ns
    told = run_script(BENCH / "curves.py", [study, "--out", "out", "--json", "again"], tmp_path).stdout
    assert (tmp_path / "out" / "R-plain-0.json").stat().st_mtime_ns == before
    assert (tmp_path / "again").read_text() == (tmp_path / "table").read_text()
    assert told.splitlines()[-1].startswith("R           plain")


def test_rules_of_selection():
    curve = [Point(1, 0.5, 0.6, 0.1, 0, 100), Point(2, 0.9, 0.9, 0.2, 0, 100), Point(3, 0.88, 0.5, 0.3, 0, 100),
             Point(4, 0.8, 0.1, 0.4, 0, 100), Point(5, 0.88, 0.8, 0.5, 0, 100),
             Point(6, 0.86, 0.9, 0.6, 0, 100)]  # fmt: skip
    chosen = {name: rule(curve).step for name, rule in RULES.items()}
    # an error of 0.9 on 100 rows is 0.03
    assert chosen == {"near, latest": 5, "near, ce": 3, "score, ce": 2, "ce": 4, "last": 6}


@pytest.mark.slow
def test_a_large_step_beside_pefts(tmp_path):
    arguments = ["--shape", "tiny", "--rows", 4, "--peft_rows", 2, "--prompt_length", 3, "--steps", 1,
                 "--json", "large"]  # fmt: skip
    done = run_script(BENCH / "bench_large.py", arguments, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads((tmp_path / "large").read_text(encoding="utf-8"))}
    assert "not on a CPU" in rows["mfu"]["absent"]
    for method in ("none", "gaussian", "pgd"):
        ours, theirs = rows[f"{method}, 4 rows"], rows[f"peft, {method}, 4 rows"]
        assert ours["rate_share"] > 0
        assert ours["mfu"] is None
        assert 0.5 < ours["peak_over_plan"] < 2
        assert ours["rows"] == theirs["rows"] == 4
        assert theirs["ratio_peft_keep"] == theirs["peft_seconds"] / ours["step_seconds"]


@pytest.mark.slow
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
