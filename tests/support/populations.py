"""A member of a population beside its run alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptp_ds.training.checkpoint import saved_steps

QUICK = ["--task", "COPA", "--prompt_length", "5", "--batch_size", "4", "--max_steps", "20", "--eval_every", "10",
         "--save_every", "10", "--lr", "0.01", "--eval_tokens", "600"]  # fmt: skip


def written(file: Path, members: list[dict]) -> str:
    """The file, with these members in it."""
    file.write_text(json.dumps(members))
    return str(file)


def steps_of(folder: Path) -> list[int]:
    """Without those that were set aside."""
    return saved_steps(folder / "checkpoints")


def require_equal(ours: Path, theirs: Path) -> None:
    """Bit for bit, at step 20."""
    mine = state_of(ours, 20)
    for name, tensor in state_of(theirs, 20).items():
        assert torch.equal(mine[name], tensor), name


def prompt_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:06d}" / "state.safetensors")


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def require_same(member: Path, alone: Path) -> None:
    """Prompt, moments, scores and records of a member and of its run alone."""
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (member, alone))
    for name in ("metrics", "best_step", "select_metrics", "majority", "steps", "seed", "task", "untrained"):
        assert ours[name] == theirs[name], name
    for step in (10, 20):
        mine, own = state_of(member, step), state_of(alone, step)
        assert mine.keys() == own.keys()
        for name in ("prompt", "best_prompt"):
            assert distance(mine[name], own[name]) < 1e-5, name
        for name in ("exp_avg", "exp_avg_sq"):  # gradients carry more rounding than the prompt that they move
            assert distance(mine[name], own[name]) < 5e-5, name
        assert float(mine["adam_step"]) == step
    assert distance(prompt_of(member), prompt_of(alone)) < 1e-5
    lines = [
        [
            line
            for text in (folder / "log.jsonl").read_text().splitlines()
            if (line := json.loads(text))["kind"] != "eval"
        ]
        for folder in (member, alone)  # a run that was stopped has an evaluation more
    ]
    for mine, own in zip(*lines, strict=True):
        assert (mine["step"], mine["kind"], mine.keys()) == (own["step"], own["kind"], own.keys())
        for name in {"loss", "cross_entropy", "divergence", "delta_norm", "grad_norm", "accuracy"} & mine.keys():
            assert mine[name] == pytest.approx(own[name], rel=1e-4, abs=1e-6), name
