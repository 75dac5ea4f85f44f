"""Short runs of scripts/train.py: their flags, and what they leave."""

import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

QUICK = ["--task", "COPA", "--prompt_length", "5", "--batch_size", "4", "--eval_tokens", "600", "--log_every", "1"]


def adapter(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]


def last_prompt(folder: Path) -> torch.Tensor:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "state.safetensors")["prompt"]


def check(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stderr[-2000:]
    return done
