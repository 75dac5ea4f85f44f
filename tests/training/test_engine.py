"""Invariants 4 and 5: sharded equals unsharded, ranks and micro-batches don't change a step, frozen stays frozen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.paths import SUPPORT
from tests.support.processes import worker_environment

STEP = ["--task", "COPA", "--max_steps", "1", "--batch_size", "8", "--prompt_length", "5", "--max_grad_norm", "0",
        "--eval_tokens", "600", "--lr", "0.01", "--weight_decay", "0.1"]  # fmt: skip


def first_gradient(folder: Path) -> torch.Tensor:
    """The first step's prompt gradient: Adam's first moment after one step, over 1 - beta1."""
    state = load_file(folder / "checkpoints" / "step-000001" / "state.safetensors")
    assert float(state["adam_step"]) == 1.0
    return state["exp_avg"] / 0.1


@pytest.mark.parametrize("perturbation", [pytest.param("mask+gaussian", marks=pytest.mark.slow), "pgd"])
def test_ranks_stages_and_micro_batches_give_one_gradient(run_train, tiny_model, tmp_path, perturbation):
    settings = {
        "one": (1, "zero3", []),
        "two": (2, "zero3", []),
        "stage2": (2, "zero2", ["--gradient_accumulation_steps", "2"]),
        "offload": (1, "zero3_offload", ["--gradient_accumulation_steps", "4"]),
    }
    states = {}
    for name, (nproc, stage, extra) in settings.items():
        out = tmp_path / name
        done = run_train(
            [*STEP, "--model", tiny_model, "--perturbation", perturbation, "--ds_config", f"ds_configs/{stage}.json",
             "--output_dir", out, *extra], nproc=nproc,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        states[name] = (first_gradient(out), json.loads((out / "result.json").read_text()))
    gradient, result = states["one"]
    assert float(gradient.norm()) > 0
    for name, (other, other_result) in states.items():
        assert float((other - gradient).norm() / gradient.norm()) < 1e-5, name
        assert other_result["world_size"] == settings[name][0]
        assert other_result["metrics"] == result["metrics"]
        assert abs(other_result["eval_cross_entropy"] - result["eval_cross_entropy"]) < 1e-5


@pytest.mark.slow
def test_a_token_budget_gives_the_same_steps_on_any_number_of_ranks(run_train, tiny_model, tmp_path):
    """Batches of uneven size, dealt unevenly to 2 ranks: sums over the global count make them one run."""
    prompts, tokens = [], []
    for nproc in (1, 2):
        out = tmp_path / str(nproc)
        done = run_train(
            ["--model", tiny_model, "--task", "COPA", "--max_steps", "5", "--log_every", "1", "--tokens_per_step",
             "250", "--prompt_length", "5", "--lr", "0.01", "--eval_tokens", "600", "--output_dir", out], nproc=nproc,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        prompts.append(load_file(out / "checkpoints" / "step-000005" / "state.safetensors")["prompt"])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_second"] * line["step_seconds"] for line in lines if line["kind"] == "train"]
        tokens.append([round(rate) - 5 * nproc for rate in rates])  # each rank has a prompt of its own
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1
    assert 150 < min(tokens[0]) <= max(tokens[0]) <= 250
    assert float((prompts[1] - prompts[0]).norm() / prompts[0].norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 50])
def test_many_steps_give_the_same_losses(run_train, tiny_model, tmp_path, steps):
    """keep and recompute, 1 and 2 ranks, micro-batches of both schedules, small chunks: one curve."""
    settings = {
        "keep": (1, ["--activations", "keep"]),
        "recompute": (1, ["--activations", "recompute", "--chunk_tokens", "100"]),
        "two ranks": (2, ["--activations", "recompute"]),
        "micro-batches": (1, ["--activations", "keep", "--gradient_accumulation_steps", "4"]),
        "depth": (2, ["--schedule", "depth", "--gradient_accumulation_steps", "2"]),
    }
    curves = {}
    for name, (nproc, extra) in settings.items():
        out = tmp_path / name.replace(" ", "-")
        done = run_train(
            ["--model", tiny_model, "--perturbation", "pgd", "--max_steps", steps, "--log_every", "1", "--batch_size",
             "8", "--prompt_length", "5", "--eval_every", "0", "--save_every", "0", "--eval_tokens", "4000",
             "--output_dir", out, *extra], nproc=nproc,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["kind"] == "train"]
        curves[name] = torch.tensor([line["loss"] for line in lines])
        assert curves[name].shape == (steps,)
        assert abs(lines[-1]["prompt_norm"] / lines[0]["prompt_norm"] - 1) > 1e-3, "the prompt has moved"
    if steps == 50:  # in fewer the batches differ by more than training gains
        assert float(curves["keep"][:5].mean() - curves["keep"][-5:].mean()) > 0
    for name, curve in curves.items():
        torch.testing.assert_close(curve, curves["keep"], atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("perturbation", "activations", "parts", "passes"),
    [
        pytest.param("gaussian", "keep", 1, 1, marks=pytest.mark.slow),
        pytest.param("pgd", "keep", 1, 3, marks=pytest.mark.slow),
        pytest.param("pgd", "recompute", 1, 3, marks=pytest.mark.slow),
        pytest.param("pgd", "keep", 2, 6, marks=pytest.mark.slow),
        pytest.param("a2t", "keep", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_zero3_keeps_half_and_gathers_little(tmp_path, perturbation, activations, parts, passes):
    """2 ranks, 4 micro-batches, 8 layers: a layer is gathered twice a pass, K + 1 passes; never more than 2 at once.

    parts: of the row, one after the other through all layers, each with passes of its own.
    a2t: one pass for the gradient, the step's, and two of a forward alone, over the prefix and over the texts.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        str(SUPPORT / "sharding_worker.py"), perturbation, activations, str(tmp_path), str(parts),
    ]  # fmt: skip
    done = subprocess.run(command, env=worker_environment(), capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in range(2)]
    for report in reports:
        assert report["kept"] == report["whole"] // 2
        assert report["gathered_between_steps"] == 0
        assert report["peak_layers"] == 2
        assert report["peak_of_layers"] <= 2 / 8
        for step in report["gathers"]:
            assert {number: count for number, count in step.items() if number != "-1"} == {
                str(layer): 2 * passes for layer in range(8)
            }
            assert step["-1"] == 1  # embeddings, norm and head: once for the whole step
        assert report["backbone_unchanged"]
        assert report["modes_unchanged"]
        assert report["no_gradient"]
    assert reports[0]["grad_norms"] == reports[1]["grad_norms"]
    assert min(reports[0]["grad_norms"]) > 0
