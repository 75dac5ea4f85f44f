"""The precision policy: what a DeepSpeed file and --precision settle, what they can't, and the line that says why."""

import json

import pytest
import torch

from ptp_ds import precision
from ptp_ds.precision import dtype_of, resolve_precision
from tests.support.paths import SUPPORT
from tests.support.zygote import run_script

BF16, FP16 = {"enabled": True}, {"enabled": True}
AUTO, OFF = {"enabled": "auto"}, {"enabled": False}


@pytest.fixture(autouse=True)
def _with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("blocks", "wanted", "native", "dtype"),
    [
        ({"bf16": AUTO}, "auto", True, torch.bfloat16),
        ({"bf16": AUTO}, "auto", False, torch.float32),
        ({"bf16": AUTO}, "bf16", False, torch.bfloat16),
        ({"bf16": AUTO}, "fp32", True, torch.float32),
        ({"bf16": AUTO}, "fp16", True, torch.float16),
        ({"bf16": AUTO, "fp16": AUTO}, "fp16", True, torch.float16),
        ({"bf16": AUTO, "fp16": AUTO}, "auto", False, torch.float32),
        ({"bf16": AUTO, "fp16": FP16}, "auto", True, torch.float16),
        ({"bf16": BF16}, "auto", False, torch.bfloat16),
        ({"bf16": BF16}, "bf16", False, torch.bfloat16),
        ({"bf16": OFF}, "auto", True, torch.float32),
        ({}, "fp32", True, torch.float32),
        ({}, "fp16", True, torch.float16),
    ],
)
def test_blocks_and_flag_settle_it(monkeypatch, blocks, wanted, native, dtype):
    monkeypatch.setattr(precision, "native_bf16", lambda: (native, "by test"))
    config = {name: dict(block) for name, block in blocks.items()}
    found, note = resolve_precision(config, wanted, "ds.json")
    assert found == dtype
    assert config["bf16"]["enabled"] is (dtype == torch.bfloat16)
    assert config.get("fp16", {"enabled": False})["enabled"] is (dtype == torch.float16)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    by_hardware = wanted == "auto" and blocks.get("bf16") is AUTO and blocks.get("fp16") is not FP16
    reason = "by test" if by_hardware else "--precision" if wanted != "auto" else ""
    assert note == (f"precision = {name} ({reason})" if reason else "")


@pytest.mark.parametrize(
    ("blocks", "wanted", "message"),
    [
        ({"bf16": BF16}, "fp32", "ds.json says bf16.enabled = true, but --precision is fp32"),
        ({"bf16": OFF}, "bf16", "ds.json says bf16.enabled = false, but --precision is bf16"),
        ({"bf16": BF16}, "fp16", "ds.json says bf16.enabled = true, but --precision is fp16"),
        ({"bf16": AUTO, "fp16": FP16}, "bf16", "ds.json says fp16.enabled = true, but --precision is bf16"),
        ({"bf16": AUTO, "fp16": OFF}, "fp16", "ds.json says fp16.enabled = false, but --precision is fp16"),
        ({"bf16": BF16, "fp16": FP16}, "auto", "ds.json enables both bf16 and fp16; choose one"),
    ],
)
def test_contradictions(blocks, wanted, message):
    with pytest.raises(ValueError, match=message):
        resolve_precision(dict(blocks), wanted, "ds.json")


@pytest.fixture
def processor(monkeypatch):
    """processor(names): the CPU can what is named, and nothing is known of it yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)

    def can(*names):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))
        precision._processors_bf16.cache_clear()

    yield can
    precision._processors_bf16.cache_clear()


@pytest.mark.parametrize(
    ("names", "native", "reason"),
    [
        (["avx512_bf16"], True, "multiplies bf16 by AVX512-BF16"),
        (["amx_bf16", "avx512_bf16"], True, "multiplies bf16 by AMX"),
        (["avx512_f", "amx_int8"], False, "neither AVX512-BF16 nor AMX"),
        ([], False, "neither AVX512-BF16 nor AMX"),
    ],
)
def test_a_processor_says_what_it_multiplies(processor, names, native, reason):
    processor(*names)
    found, why = precision.native_bf16()
    assert found is native
    assert reason in why
    assert dtype_of("auto") == (torch.bfloat16 if native else torch.float32)


def test_bf16_is_not_taken_where_onednn_may_not_or_computes_otherwise(processor, monkeypatch):
    processor("avx512_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert precision.native_bf16() == (
        False, "no GPU here; oneDNN's bf16 products are turned off by ONEDNN_MAX_CPU_ISA=AVX512_CORE"
    )  # fmt: skip
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert precision.native_bf16()[0]
    processor("avx512_bf16")
    monkeypatch.setattr(torch, "mm", lambda x, y: (x.float() @ y.float() * 1.02).to(x.dtype))
    assert "differ from fp32 ones by 2e-02" in precision.native_bf16()[1]


def test_fp16_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        resolve_precision({"bf16": dict(AUTO)}, "fp16", "ds.json")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        dtype_of("fp16")


@pytest.mark.parametrize(("stage", "perturbation"), [pytest.param(2, "pgd", marks=pytest.mark.slow), (3, "free")])
def test_fp16_trains_as_fp32_does_and_resumes(stage, perturbation):
    done = run_script(SUPPORT / "fp16_worker.py", [stage, perturbation, 0])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    moved = found["moved"]
    skipped = moved.count(False)
    assert skipped > 0, "the first scale, 2^20, overflows here"
    assert all(moved[4:])
    assert 1 < found["scale"] < 2**20
    assert found["fp16"][0] == pytest.approx(found["fp32"][0], rel=0.02)
    # the same curve, later by the steps that were skipped
    assert found["fp16"][-1] == pytest.approx(found["fp32"][-1 - skipped], rel=0.1)
    assert found["fp32"][-1] < 0.5 * found["fp32"][0]
    assert found["resumed"]
    assert found["resumed_scale"] == found["scale"]


def test_a_loss_scale_that_the_configuration_fixes_is_saved_and_resumed():
    """A scaler that doesn't move has no numbers of its own."""
    done = run_script(SUPPORT / "fp16_worker.py", [2, "gaussian", 128])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found["moved"])
    assert found["resumed"]
    assert found["resumed_scale"] == found["scale"] == 128
