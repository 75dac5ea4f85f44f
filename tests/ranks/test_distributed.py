"""What a process sets before DeepSpeed and torch's allocator start."""

import subprocess
import sys

import pytest
import torch

from ptp_ds.ranks import distributed
from tests.support.processes import child_environment


@pytest.mark.parametrize(
    ("available", "initialised", "settings"),
    [(False, False, None), (True, False, "expandable_segments:True"), (True, True, None)],
)
def test_the_allocator_is_told_before_it_starts_or_not_at_all(available, initialised, settings, monkeypatch):
    """A program that calls ptp_ds.train behind work of its own on the GPU keeps its allocator."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is as it was behind the test
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    distributed.prepare_environment()
    assert distributed.os.environ.get("PYTORCH_ALLOC_CONF") == settings


@pytest.mark.parametrize(("variable", "value"), [("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2")])
def test_more_ranks_than_gpus_are_refused_before_anything_else(variable, value, monkeypatch):
    """The rank beyond the last GPU knows it; where DeepSpeed's launcher has told their number, each rank does."""
    for name in ("LOCAL_RANK", "LOCAL_SIZE", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "0")  # so that it is as it was behind the test
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r"^This host shows 1 GPU\(s\) to 2 ranks; start a rank a GPU: --num_gpus 1, or "
    ):
        distributed.start_processes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_torch_heeds_it():
    code = """
from ptp_ds.ranks.distributed import prepare_environment
prepare_environment()
import torch
torch.zeros(1, device="cuda")
print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""
    environment = {name: value for name, value in child_environment({}).items() if not name.endswith("_ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
