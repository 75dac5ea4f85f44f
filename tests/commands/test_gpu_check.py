"""scripts/gpu_check.sh without a GPU: its driver by an interpreter that plays the parts, and every part by --dry."""

import json
import re
import subprocess
import sys
import time
import warnings
from dataclasses import fields
from types import SimpleNamespace

import bench_large
import bench_step
import gpu_sweep
import pytest
import torch
from bench_random import Opened, config_of_shape, open_random
from gpu_parts import BY_NAME, PARTS
from gpu_profile import Work, busy_of, kind_of, works_of
from gpu_record import Record
from gpu_syncs import watching
from gpu_tests import counts_of
from torch.autograd import DeviceType

from ptp_ds.config.run_config import RunConfig
from ptp_ds.kernels import liger
from tests.support.paths import ROOT
from tests.support.processes import worker_environment

BENCH = ROOT / "scripts" / "bench"
# An interpreter of the check's: parts of the names in FAIL end with 3, those in HANG don't end, all others leave a row.
STUB = """#!/usr/bin/env bash
case "$1" in
    */gpu_check.py | scripts/bench/gpu_check.py) exec {python} "$@" ;;
    -c) echo '{{"gpus": {gpus}, "gpu": "a card", "versions": {{"torch": "0", "git_revision": "none"}}}}'; exit 0 ;;
    */gpu_tiny.py) exit 0 ;;
esac
name=$(basename "${{@: -1}}" .json)
echo '[{{"case": "early", "step_seconds": 0.5, "peak_bytes": 3221225472}}]' >"${{@: -1}}"
echo "$name says: $*"
case " $FAIL " in *" $name "*) exit 3 ;; esac
case " $HANG " in *" $name "*) sleep 60 ;; esac
exit 0
"""
FAILING = """#!/usr/bin/env bash
case "$1" in */gpu_encoder.py) echo "no encoder today"; exit 3 ;; esac
exec {python} "$@"
"""


def check(tmp_path, *arguments, text=STUB, gpus=0, **env):
    """(finished process, gpu_check.json or None) of the check with an interpreter made of `text`."""
    stub = tmp_path / "python"
    stub.write_text(text.format(python=sys.executable, gpus=gpus))
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "gpu_check.sh", "--out", tmp_path / "out", *arguments],
        env={**worker_environment(), "PYTHON": str(stub), "FAIL": "", "HANG": "", **env}, cwd=tmp_path,
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    file = tmp_path / "out" / "gpu_check.json"
    return done, json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def statuses(report):
    return {name: part["status"] for name, part in report["parts"].items()}


def test_parts_run_in_order_on_a_gpu(tmp_path):
    done, report = check(tmp_path, gpus=1)
    assert done.returncode == 0, done.stderr
    assert list(report["parts"]) == list(BY_NAME)
    assert set(statuses(report).values()) == {"ok"}
    assert report["gpu"] == "a card"
    assert report["parts"]["step_8b"]["rows"] == [{"case": "early", "step_seconds": 0.5, "peak_bytes": 3221225472}]
    assert "early: step 500.0 ms, peak 3.00 GiB" in done.stdout
    assert "step_8b says: " + str(BENCH / "bench_large.py") + " --shape 8b" in done.stdout
    assert "--dry" not in done.stdout


def test_a_failing_part_and_an_endless_one_leave_the_others(tmp_path):
    start = time.monotonic()
    done, report = check(tmp_path, "step_8b", "syncs", "flash", "--dry", "--limit", "2", FAIL="step_8b", HANG="syncs")
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    assert statuses(report) == {"step_8b": "failed", "syncs": "ended at its limit", "flash": "ok"}
    assert report["parts"]["step_8b"]["exit_code"] == 3
    assert report["parts"]["step_8b"]["output"][-1].startswith("step_8b says")
    assert report["parts"]["syncs"]["rows"], "what was known before the end stays"
    assert done.stdout.rstrip().endswith("failed: step_8b; ended at its limit: syncs; ok: flash")


def test_parts_that_no_longer_fit_are_named(tmp_path):
    done, report = check(tmp_path, "step_8b", "encoder", "--minutes", "1", gpus=1)
    assert BY_NAME["step_8b"].usual / 2 > 60 > BY_NAME["encoder"].usual / 2
    assert done.returncode == 0, done.stderr
    assert statuses(report) == {"step_8b": "not run: no time left", "encoder": "ok"}
    assert "step_8b [not run: no time left]" in done.stdout


def test_wrong_calls_are_refused(tmp_path):
    done, report = check(tmp_path, "step_9b")
    assert (done.returncode, report) == (2, None)
    assert "'step_9b' is no part of this check; they are step_8b, " in done.stderr
    done, report = check(tmp_path, "syncs")
    assert (done.returncode, report) == (2, None)
    assert "no CUDA GPU is visible" in done.stderr


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_a_part_names_what_its_script_takes(part):
    text = (BENCH / part.script).read_text(encoding="utf-8")
    known = set(re.findall(r"\"(--[\w-]+)\"", text)) | ({"--dry", "--json"} if "part_parser(" in text else set())
    if "parse_known_args(" in text:  # hands on what scripts/train.py takes
        known |= {f"--{field.name}" for field in fields(RunConfig)}
    for words in (part.arguments, part.dry):
        assert {word for word in words if word.startswith("--")} <= known
    assert "--json" in known
    assert 0 < part.usual <= 600


@pytest.mark.slow
def test_every_part_leaves_its_rows_by_a_dry_run_and_a_failing_one_is_told(tmp_path):
    done, report = check(tmp_path, "--dry", text=FAILING)
    assert done.returncode == 1, done.stdout[-3000:]
    assert statuses(report) == {name: "failed" if name == "encoder" else "ok" for name in BY_NAME}, done.stdout[-9000:]
    assert report["parts"]["encoder"]["output"] == ["no encoder today"]
    assert report["gpus"] == 0
    for name, part in report["parts"].items():
        if name == "encoder":
            continue
        assert part["rows"], name
        assert not [row for row in part["rows"] if isinstance(row.get("error"), str)], name
        assert (tmp_path / "out" / f"{name}.json").is_file()
    told = {name: " ".join(row.get("absent", "") for row in part["rows"]) for name, part in report["parts"].items()}
    for name in ("step_8b", "syncs", "profile", "train", "tests", "flash", "ranks", "kernel_tests"):
        assert "not on a CPU" in told[name], name
    assert all("flash_ms" not in row for row in report["parts"]["flash"]["rows"]), "no number where there is no kernel"


def test_every_timed_step_has_rows_of_its_own(ranks, monkeypatch):
    opened = open_random(config_of_shape("tiny"), RunConfig(prompt_length=3, precision="fp32"), ranks)
    seen, step = [], Opened.step

    def noting(self, row, *more):
        seen.append(tuple(row.token_ids.tolist()))
        return step(self, row, *more)

    monkeypatch.setattr(Opened, "step", noting)
    found = bench_large.measure(opened, opened.run, 3, 4)
    assert len(set(seen)) == len(seen) == 5, "one step that warms up and is measured for memory, four that are timed"
    assert found["peak_bytes"] > found["planned_bytes"] / 2


def test_the_step_benchmark_warms_up_on_a_batch_that_it_does_not_time():
    begun, timed = [], []
    bench = SimpleNamespace(
        begin=lambda batch, *_: begun.append(batch), time=lambda batch, *_: timed.append(batch), row=lambda *_: {},
        precision="fp32", times=bench_step.Timings(), peft={}, plain_keep=[],
    )  # fmt: skip
    bench_step.measure({"method": "none"}, [["a"], ["b"], ["c"]], [bench], RunConfig())
    assert (begun, timed) == ([["c"]], [["a"], ["b"]])


def test_weights_are_alike_on_any_stage(ranks):
    """What lets gradients of two ranks, of ZeRO-2 and of offloaded weights be held against those of one rank."""
    sums = []
    for name in ("zero3", "zero2", "zero3_offload"):
        run = RunConfig(ds_config=f"ds_configs/{name}.json", prompt_length=3, precision="fp32")
        opened = open_random(config_of_shape("tiny"), run, ranks, alike=True)
        with opened.backbone.shards.layer(1), opened.backbone.shards.outside_layers():
            weights = [p.detach().clone() for p in (*opened.backbone.model.model.layers[1].parameters(),
                                                    *opened.backbone.model.lm_head.parameters())]  # fmt: skip
        sums.append(torch.cat([weight.flatten() for weight in weights]))
    assert sums[0].abs().sum() > 0
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_a_case_that_raises_leaves_the_others(tmp_path):
    record = Record(tmp_path / "rows.json", speaks=False)
    with record.case("one"):
        raise ValueError("no such thing\nbut long")
    with record.case("two", may_not_fit=True):
        raise torch.OutOfMemoryError("too much")
    record.add("three", value=1)
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert rows == [{"case": "one", "error": "ValueError: no such thing"},
                    {"case": "two", "absent": "out of memory (too much)"}, {"case": "three", "value": 1}]  # fmt: skip
    assert record.code == 1
    assert Record(None).code == 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "product"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "product"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "product"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", "communication"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long>", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "elementwise"),
        ("_rms_norm_forward_kernel", "elementwise"),
        ("aten::mm", "product"),
        ("aten::mul", "elementwise"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


def test_a_gpus_works_are_its_kernels_alone():
    def event(name, device_type, start, end, annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=device_type, time_range=span, is_user_annotation=annotation,
                               self_cpu_time_total=1.0)  # fmt: skip

    events = [event("gemm", DeviceType.CUDA, 0, 4), event("step", DeviceType.CUDA, 0, 9, annotation=True),
              event("aten::mm", DeviceType.CPU, 0, 6), event("MyFunction", DeviceType.CPU, 0, 7)]  # fmt: skip
    assert works_of(events, cuda=True) == [Work("gemm", 0, 4, 4)]
    assert works_of(events, cuda=False) == [Work("aten::mm", 0, 6, 1.0)]


def test_busy_time_counts_overlaps_once():
    spans = [(5.0, 9.0), (0.0, 2.0), (1.0, 3.0), (6.0, 7.0), (9.0, 10.0)]
    assert busy_of([Work("", start, end, end - start) for start, end in spans]) == 3 + 5
    assert busy_of([]) == 0


def test_operations_that_would_wait_are_counted():
    x = torch.arange(4.0)
    with watching(cuda=False) as watch:
        _ = x.sum().item()
        _ = x[x > 1]
        _ = x[torch.tensor([0, 1])]
        _ = x.nonzero()
        _ = x + 1
    assert sum(watch.by_operation.values()) == 3
    assert watch.by_operation["_local_scalar_dense.default"] == 1


def test_warnings_of_waiting_are_counted_by_operation_and_line(monkeypatch):
    """torch's warnings, played by Python's: what is counted where there is a GPU."""
    modes = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(set_sync_debug_mode=modes.append))
    with watching(cuda=True) as watch:
        watch.current = "item"
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        watch.current = ""
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert watch.by_operation == {"item": 2, "between operations": 1}
    assert modes == ["warn", "default"]


def test_both_schedules_are_swept_and_depth_takes_its_micro_batches_one_after_the_other(ranks):
    swept = [settings for _, settings in gpu_sweep.settings_of(gpu_sweep.DRY[0])]
    assert [settings["schedule"] for settings in swept if "schedule" in settings] == ["breadth", "depth"]
    opened = open_random(config_of_shape("tiny"), RunConfig(precision="fp32"), ranks)
    run = RunConfig(perturbation="gaussian", schedule="depth", gradient_accumulation_steps=2)
    whole, parts = opened.rows(5, 1)[0], opened.parted(5, 1, 2)[0]
    assert sum(row.num_tokens for row in parts) == whole.num_tokens
    one, several = opened.loss(whole, 0, run), opened.loss(parts, 0, run)
    assert several.tokens == one.tokens + opened.start.shape[0]  # each part has the prompt in front


def test_ligers_kernels_can_be_left_out(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    asked = ("auto", torch.device("cuda"), torch.bfloat16)
    assert liger.available(*asked)
    with gpu_sweep.without_liger():
        assert not liger.available(*asked)
    assert liger.available(*asked)


def test_pytests_last_line():
    assert counts_of("3 failed, 21 passed, 1 skipped, 5 deselected in 12.30s (0:00:12)") == {
        "failed": 3, "passed": 21, "skipped": 1, "deselected": 5
    }  # fmt: skip
    assert counts_of("no tests ran in 0.1s") == {}
