"""The residual soft prompt: the start, torch's own layers as the reference, whole runs, two ranks, a resume, seeds."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ptp_ds.config.checks import require_valid
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.source import load_config
from ptp_ds.prompts import ResidualPrompt, prompt_width
from tests.support.populations import QUICK as POPULATION
from tests.support.populations import require_same
from tests.support.runs import QUICK, adapter, check, last_prompt

LENGTH, HIDDEN = 5, 12


@pytest.fixture
def residual(tiny_model) -> ResidualPrompt:
    return ResidualPrompt(LENGTH, prompt_width("soft", load_config(tiny_model)), HIDDEN)


def initial(residual: ResidualPrompt, beside: int = 0) -> torch.Tensor:
    return torch.randn(residual.length + beside, residual.width, generator=torch.Generator().manual_seed(3))


def test_it_starts_as_the_initial_prompt_to_the_bit(residual):
    weight = residual.start(initial(residual, beside=2), seed=1)
    assert weight.shape == (residual.flat.rows + 2, residual.width)
    assert torch.equal(residual.trained_of(weight), initial(residual, beside=2))
    assert torch.equal(residual.start(initial(residual, beside=2), seed=1), weight)
    assert not torch.equal(residual.start(initial(residual, beside=2), seed=2), weight)


def test_it_computes_what_torchs_layers_do(residual):
    """Values and gradients, to the prompt by both ways and to every weight."""
    down, up = torch.nn.Linear(residual.width, HIDDEN), torch.nn.Linear(HIDDEN, residual.width)
    prompt = initial(residual).requires_grad_()
    leaves = {"prompt": prompt, "down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
    weight = residual.flat.pack({name: leaf.detach() for name, leaf in leaves.items()}).requires_grad_()
    ours, theirs = residual.prompt(weight), prompt + up(torch.relu(down(prompt)))
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    found = residual.flat.split(weight.grad)
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, msg=name)
        assert float(leaf.grad.norm()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_residual": 0}, r"^--prompt_residual is 0; expected a whole number of 1 or more\.$"),
        ({"prompt_residual": 8, "prompt": "deep"}, "leave it or --prompt deep out"),
        ({"prompt_residual": 8, "prompt_mlp": 8}, "leave it or --prompt_mlp out"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        require_valid(RunConfig(**settings))


@pytest.mark.slow
def test_runs_on_one_and_two_ranks_resume_and_export(run_train, tiny_model, tmp_path, residual):
    """Two ranks under ZeRO-3 as one; a resumed run ends in the same bits; the adapter is a plain prompt."""
    args = [*QUICK, "--model", tiny_model, "--prompt_residual", str(HIDDEN), "--perturbation", "pgd", "--lr", "0.01",
            "--max_steps", "4", "--save_every", "2", "--eval_every", "2", "--keep_checkpoints", "5"]  # fmt: skip
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    check(run_train([*args, "--output_dir", one]))
    check(run_train([*args, "--output_dir", two], nproc=2))
    check(run_train([*args, "--output_dir", again, "--resume", two / "checkpoints" / "step-000002"], nproc=2))
    assert torch.equal(last_prompt(again), last_prompt(two))
    weight = last_prompt(one)
    assert weight.shape == (residual.flat.rows, residual.width)
    assert float((last_prompt(two) - weight).norm() / weight.norm()) < 1e-5
    states = [load_file(one / "checkpoints" / f"step-{step:06}" / "state.safetensors") for step in (2, 4)]
    parts = [residual.flat.split(state["prompt"]) for state in states]
    assert not any(torch.equal(parts[0][name], tensor) for name, tensor in parts[1].items())
    best = states[json.loads((one / "result.json").read_text())["best_step"] // 2 - 1]["prompt"]
    assert torch.equal(residual.prompt(best), adapter(one))


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--prompt_residual", "6"], ["--prompt_mlp", "6", "--prompt", "deep"]])
def test_a_member_of_a_population_is_its_lone_run(run_train, tiny_model, tmp_path, how):
    """Each member has a network of its own, and a running mean of it."""
    args = [*POPULATION, "--model", tiny_model, "--average", "0.9", *how]
    check(run_train([*args, "--seeds", "0", "4", "--output_dir", tmp_path / "all"]))
    check(run_train([*args, "--seed", "4", "--output_dir", tmp_path / "alone"]))
    require_same(tmp_path / "all" / "members" / "seed-4", tmp_path / "alone")
