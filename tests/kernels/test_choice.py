"""Which implementation runs where, and that nothing needs Triton where there is no GPU."""

import json
import re
import subprocess
import sys

import pytest
import torch

from ptp_ds.kernels import explain, liger, noise
from ptp_ds.kernels.choice import block_of, refusal, use_triton, warps_of
from tests.support.kernel_cases import make_places
from tests.support.paths import ROOT, SUPPORT
from tests.support.processes import child_environment, worker_environment

CPU = torch.device("cpu")
X = torch.zeros(2)

WITHOUT_TRITON = """
import sys
from pathlib import Path
sys.modules["triton"] = None  # as if it were not installed
import torch
from ptp_ds.kernels import explain, noise, perturb_step, places_of
places = places_of(torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64), torch.tensor([4]))
delta = noise("uniform", 1, 2, places, 5, 0.1)
perturb_step(delta, torch.ones(3, 5), places, norm="frobenius", radius=0.2, length=0.1, embeds_TH=torch.zeros(3, 5))
print(explain("auto", torch.device("cpu"), torch.float32))
try:
    noise("uniform", 1, 2, places, 5, 0.1, impl="triton")
except ValueError as error:
    print(error)
"""


def run(code: str, **extra: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(extra), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_without_triton_the_references_run():
    assert run(WITHOUT_TRITON, TRITON_INTERPRET="0") == [
        "torch (Triton is not installed)",
        "impl='triton' can't run here: Triton is not installed. Use impl='auto' or impl='torch'.",
    ]


def test_on_a_cpu_kernels_are_refused_unless_interpreted():
    code = WITHOUT_TRITON.replace('sys.modules["triton"] = None', "")
    assert run(code, TRITON_INTERPRET="0") == [
        "torch (tensors lie on a CPU)",
        "impl='triton' can't run here: tensors lie on a CPU. Use impl='auto' or impl='torch'.",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
def test_auto_never_interprets():
    assert not use_triton("auto", X)
    assert use_triton("triton", X)
    assert not use_triton("torch", X)
    assert explain("auto", CPU, torch.float32) == "torch (auto never interprets)"
    assert explain("torch", CPU, torch.float32) == "torch (--kernels torch)"
    assert explain("triton", CPU, torch.float32).startswith("triton ")


def test_dtypes_that_kernels_do_not_know():
    assert "not float64" in refusal(CPU, torch.float64)
    assert not use_triton("auto", X.double())
    with pytest.raises(ValueError, match="kernels know fp32, bf16 and fp16, not float64"):
        use_triton("triton", X.double())


def test_an_unknown_impl_is_refused():
    with pytest.raises(ValueError, match="Unknown impl 'cuda'; choose from auto, triton, torch"):
        noise("normal", 0, 0, make_places([2]), 4, 1.0, impl="cuda")


def test_liger_is_for_a_gpu():
    assert not liger.available("auto", CPU, torch.float32)
    assert not liger.available("torch", torch.device("cuda"), torch.float32)
    assert not liger.available("auto", torch.device("cuda"), torch.float64)


@pytest.mark.parametrize(("size", "most", "block"), [(1, 64, 1), (5, 64, 8), (64, 64, 64), (65, 64, 64), (3, 2, 2)])
def test_block_of(size, most, block):
    assert block_of(size, most) == block


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' own tests compile them here")
def test_every_kernel_compiles_for_gpus_that_are_not_here():
    """Triton's interpreter runs what its compiler may refuse: Ampere's and Hopper's machine code is made of each."""
    worker = SUPPORT / "compile_worker.py"
    environment = worker_environment({"TRITON_INTERPRET": "0"})
    done = subprocess.run([sys.executable, str(worker)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    kernels = ROOT / "ptp_ds" / "kernels"
    named = {
        f"{file.stem}.{name}" for file in kernels.glob("*.py")
        for name in re.findall(r"def (\w+_kernel)\(", file.read_text()) if file.stem != "choice"
    }  # fmt: skip
    assert set(found) == named
    assert all(found.values())


@pytest.mark.parametrize(("numbers", "warps"), [(1, 4), (2048, 4), (4096, 8), (8192, 16), (16384, 32), (1 << 20, 32)])
def test_warps_of(numbers, warps):
    assert warps_of(numbers) == warps


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels' own tests compile them here")
def test_a_token_of_a_wide_model_stays_in_registers():
    """Compiled for Hopper, not run: at 8192 and 16384 numbers a thread has no more on its stack than at 48."""
    worker = SUPPORT / "compile_worker.py"
    environment = worker_environment({"TRITON_INTERPRET": "0"})
    command = [sys.executable, str(worker), "48", "8192", "16384"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 3 * 4
    for name, (warps, stack) in found.items():
        kernel, width = name.rsplit(" ", 1)
        assert warps == {"48": 4, "8192": 16, "16384": 32}[width], name
        assert stack <= found[f"{kernel} 48"][1], name
