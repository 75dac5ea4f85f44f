"""An adapter of a run, with the paths that a run's card has."""

from pathlib import Path

import pytest
import torch

from ptp_ds.adapters.write import write_adapter
from ptp_ds.models.source import load_config
from ptp_ds.tasks import load_task


@pytest.fixture
def made(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter of CB as a run writes it that was given its model, data and output by paths of this machine."""
    settings = {
        "model": str(tiny_model), "data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "run"), "lr": 0.03,
        "ds_config": "ds_configs/zero3.json", "init_adapter": None, "perturbation": str(tmp_path / "own.py"),
        "perturbation_args": f"table={tmp_path}/words.txt", "task": "CB", "max_steps": 4, "init_text": "/ or \\",
        "train_split": "train", "dataset": None, "resume": None, "nvme_path": None, "population": None,
    }  # fmt: skip
    result = {
        "task": "CB", "model": str(tiny_model), "perturbation": "own", "prompt": "soft", "seed": 3, "steps": 4,
        "metrics": {"accuracy": 0.75, "macro_f1": 0.5}, "untrained": {"accuracy": 0.25, "macro_f1": 0.125},
        "majority": 0.5, "eval_split": "dev", "eval_examples": 56, "settings": settings,
        "training_data_sha256": "0123456789abcdef" * 4,
    }  # fmt: skip
    card = {
        "task": load_task("CB").spec(), "head": {"kind": "causal"}, "model": {"name": str(tiny_model), "width": 32},
        "data": {"data_dir": str(tmp_path / "data"), "dataset": None}, "result": result,
        "versions": {"torch": "2.13.0", "ptp_ds": None},
    }  # fmt: skip
    prompt = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    write_adapter(tmp_path / "run" / "adapter", prompt, str(tiny_model), load_config(tiny_model), card)
    return tmp_path / "run" / "adapter"
