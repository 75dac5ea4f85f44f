"""Prompts computed by an MLP: peft's own encoders as the reference, the start, whole runs, resume, export."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ptp_ds.adapters.read import adapter_kind
from ptp_ds.config.checks import require_valid
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.source import load_config
from ptp_ds.prompts import SoftPrompt, prompt_mlp, prompt_width
from ptp_ds.prompts.mlp import PromptMlp
from tests.support.paths import ROOT
from tests.support.runs import QUICK, adapter, check, last_prompt

KINDS = ("soft", "deep")


def initial(mlp: PromptMlp) -> torch.Tensor:
    return torch.randn(mlp.length, mlp.width, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=KINDS)
def mlp(request, tiny_model) -> PromptMlp:
    """For the tiny model: soft 32 -> 32, deep 16 -> 64; hidden 24, so that tensors end within a row."""
    return prompt_mlp(request.param, 5, 24, load_config(tiny_model))


def test_it_starts_as_the_initial_prompt_to_the_bit(mlp, tiny_model):
    weight = mlp.start(initial(mlp), seed=1)
    assert weight.shape == (mlp.flat.rows, prompt_width(mlp.kind, load_config(tiny_model)))
    assert torch.equal(mlp.prompt(weight), initial(mlp))
    assert torch.equal(mlp.start(initial(mlp), seed=1), weight)
    assert not torch.equal(mlp.start(initial(mlp), seed=2), weight)
    assert mlp.prompt(weight.bfloat16()).dtype == torch.bfloat16


def encoder_of_peft(mlp: PromptMlp) -> torch.nn.Module:
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": mlp.length, "token_dim": mlp.embedding,
              "num_transformer_submodules": 1, "encoder_hidden_size": mlp.hidden}  # fmt: skip
    if mlp.kind == "soft":
        from peft import PromptEncoder, PromptEncoderConfig

        return PromptEncoder(PromptEncoderConfig(**common))
    from peft import PrefixEncoder, PrefixTuningConfig

    layers = mlp.width // (2 * mlp.embedding)
    return PrefixEncoder(PrefixTuningConfig(**common, num_layers=layers, prefix_projection=True))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_it_computes_what_pefts_encoder_does(mlp):
    """Values and gradients with peft's weights in the rows; the base is added and gets no gradient."""
    encoder = encoder_of_peft(mlp)
    layers = [module for module in encoder.modules() if isinstance(module, torch.nn.Linear)]
    tensors = {"base": initial(mlp), "embedding": encoder.embedding.weight.detach()}
    for number, layer in enumerate(layers):
        tensors |= {f"weight{number}": layer.weight.detach(), f"bias{number}": layer.bias.detach()}
    weight = mlp.flat.pack(tensors).requires_grad_()
    theirs, ours = encoder(torch.arange(mlp.length)), mlp.prompt(weight)
    torch.testing.assert_close(ours, initial(mlp) + theirs)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    expected = {"base": torch.zeros_like(tensors["base"]), "embedding": encoder.embedding.weight.grad}
    for number, layer in enumerate(layers):
        expected |= {f"weight{number}": layer.weight.grad, f"bias{number}": layer.bias.grad}
    torch.testing.assert_close(weight.grad, mlp.flat.pack(expected))


def test_a_plain_prompt_is_its_weight():
    weight = torch.randn(3, 4)
    module = SoftPrompt(weight)
    assert torch.equal(module(), weight)
    assert module.trained_of(weight) is weight


def test_range():
    with pytest.raises(ValueError, match=r"^--prompt_mlp is 0; expected a whole number of 1 or more\.$"):
        require_valid(RunConfig(prompt_mlp=0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_on_one_and_two_ranks_resume_and_export(run_train, tiny_model, tmp_path, kind):
    """Two ranks under ZeRO-3, or 2, as one; a resumed run ends in the same bits; the adapter is a plain prompt."""
    args = [*QUICK, "--model", tiny_model, "--prompt", kind, "--prompt_mlp", "24", "--perturbation", "pgd", "--lr",
            "0.003", "--max_steps", "4", "--save_every", "2", "--eval_every", "2", "--weight_decay", "0.01",
            "--keep_checkpoints", "5"]  # fmt: skip
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    check(run_train([*args, "--output_dir", one]))
    check(run_train([*args, "--output_dir", two], nproc=2))
    check(run_train([*args, "--output_dir", again, "--resume", two / "checkpoints" / "step-000002"], nproc=2))
    assert torch.equal(last_prompt(again), last_prompt(two))
    assert torch.equal(adapter(again), adapter(two))
    others = [two]
    if kind == "soft":
        others.append(tmp_path / "zero2")
        zero2 = ["--ds_config", ROOT / "ds_configs" / "zero2.json", "--output_dir", others[-1]]
        check(run_train([*args, *zero2], nproc=2))
    mlp, weight = prompt_mlp(kind, 5, 24, load_config(tiny_model)), last_prompt(one)
    assert weight.shape == (mlp.flat.rows, mlp.width)
    for other in others:
        assert float((last_prompt(other) - weight).norm() / weight.norm()) < 1e-5
    states = [load_file(one / "checkpoints" / f"step-{step:06}" / "state.safetensors") for step in (2, 4)]
    parts = [mlp.flat.split(state["prompt"]) for state in states]
    assert not any(torch.equal(parts[0][name], tensor) for name, tensor in parts[1].items())
    best = states[json.loads((one / "result.json").read_text())["best_step"] // 2 - 1]["prompt"]
    assert torch.equal(mlp.prompt(best), adapter(one))
    assert torch.equal(states[1]["best_prompt"], adapter(one))
    assert adapter_kind(one / "adapter") == kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft", "deep"])
def test_a_tiny_learning_rate_leaves_the_initial_prompt(run_train, tiny_model, tmp_path, kind):
    """The same seed with and without an MLP starts at the same prompt, so their first losses are equal.

    What is scored as untrained is that prompt: a run that moves it by nothing ends with its score.
    """
    losses = []
    for extra in ([], ["--prompt_mlp", "24"]):
        out = tmp_path / str(len(losses))
        check(run_train([*QUICK, "--model", tiny_model, "--prompt", kind, "--max_steps", "1", "--output_dir", out,
                         "--lr", "1e-20", *extra]))  # fmt: skip
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses += [line["loss"] for line in lines if line["kind"] == "train"]
        result = json.loads((out / "result.json").read_text())
        assert result["metrics"] == result["untrained"]
        assert result["eval_cross_entropy"] == pytest.approx(result["untrained_cross_entropy"], rel=1e-6)
    assert losses[0] == losses[1]
    torch.testing.assert_close(adapter(tmp_path / "1"), adapter(tmp_path / "0"), rtol=0, atol=1e-12)
