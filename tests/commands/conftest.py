"""Fixtures of the commands' tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

import ptp_ds

RUN = {"task": "COPA", "prompt_length": 4, "batch_size": 4, "max_steps": 20, "schedule_steps": 20, "eval_every": 10,
       "save_every": 5, "eval_tokens": 600, "lr": 0.05, "log_every": 1, "perturbation": "gaussian",
       "verbose": False}  # fmt: skip


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path) -> Callable[..., ptp_ds.Result]:
    """job(folder, **settings): ptp_ds.train with RUN's settings and these."""

    def train(folder: str, **settings: object) -> ptp_ds.Result:
        return ptp_ds.train(model=tiny_model, output_dir=tmp_path / folder, **{**RUN, **settings})

    return train
