"""--average: the running mean of the prompt that is scored and saved, beside the prompt that trains."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import QUICK, adapter, check

ARGS = [*QUICK, "--max_steps", "6", "--eval_every", "3", "--save_every", "1", "--keep_checkpoints", "9", "--lr", "0.1",
        "--average", "0.6"]  # fmt: skip


def state(folder, step):
    return load_file(folder / "checkpoints" / f"step-{step:06}" / "state.safetensors")


def test_the_mean_is_that_of_the_prompts_and_is_what_is_kept(run_train, tiny_model, tmp_path):
    args = [*ARGS, "--model", tiny_model]
    check(run_train([*args, "--output_dir", tmp_path / "run"]))
    states = {step: state(tmp_path / "run", step) for step in range(1, 7)}
    check(run_train([*args, "--average", "0", "--output_dir", tmp_path / "plain"]))
    assert torch.equal(state(tmp_path / "plain", 6)["prompt"], states[6]["prompt"]), "training is the same"
    assert "average" not in state(tmp_path / "plain", 6)
    mean = states[1]["average"]
    for step in range(2, 7):  # the decay: (1 + t) / (10 + t), from step 14 on 0.6
        decay = min(0.6, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * states[step]["prompt"]
        torch.testing.assert_close(states[step]["average"], mean, atol=1e-6, rtol=1e-5)
    best = json.loads((tmp_path / "run" / "result.json").read_text())["best_step"]
    assert torch.equal(states[6]["best_prompt"], states[best]["average"])
    assert torch.equal(adapter(tmp_path / "run"), states[best]["average"])
    assert not torch.equal(states[best]["average"], states[best]["prompt"])
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000004", half / "checkpoints" / "step-000004")
    check(run_train([*args, "--resume", "auto", "--output_dir", half]))
    assert all(torch.equal(state(half, 6)[name], states[6][name]) for name in states[6])
    done = run_train([*args, "--average", "0.5", "--resume", "auto", "--output_dir", half])
    assert done.returncode == 2
    assert "its average is 0.6, this run's is 0.5" in done.stderr


@pytest.mark.slow
def test_members_on_two_ranks_have_their_own(run_train, tiny_model, tmp_path):
    args = [*ARGS, "--model", tiny_model]
    check(run_train([*args, "--seeds", "0", "4", "--output_dir", tmp_path / "all"], nproc=2))
    for seed in (0, 4):
        check(run_train([*args, "--seed", seed, "--output_dir", tmp_path / f"{seed}"]))
        ours, theirs = state(tmp_path / "all" / "members" / f"seed-{seed}", 6), state(tmp_path / f"{seed}", 6)
        for name in ("prompt", "average", "best_prompt"):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
