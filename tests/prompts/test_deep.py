"""Deep prompts: packed passes against transformers' own cache of keys and values, one row at a time; peft's format."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ptp_ds.adapters.read import adapter_kind, read_adapter
from ptp_ds.adapters.write import write_adapter
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.source import load_config
from ptp_ds.packing.row import pack, pack_text_twins
from ptp_ds.perturb import PERTURBATIONS, Noise, SharedPass
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.prompts import prompt_width
from ptp_ds.prompts.deep import join_deep, split_deep
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.evaluate import score_examples
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.deep_prompts import WINDOWED, cached_scores, deep_prompt
from tests.support.packed import divergence, make_prompt
from tests.support.reference import FAMILIES, make_examples, make_model, plain_scores, relative_error
from tests.support.zygote import run_script


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WINDOWED))
@pytest.mark.parametrize("perturbation", ["none", "gaussian", "pgd", "free"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_step_gradient_equals_the_familys_own_cache(family, perturbation, activations):
    examples, backbone = make_examples("ragged"), Backbone(make_model(family), Activations(activations), "deep")
    prompt = deep_prompt(backbone.model).requires_grad_()
    run = RunConfig(
        perturbation=perturbation,
        prompt="deep",
        divergence="sym_kl",
        divergence_gradient="both",
        epsilon=0.5,
        sigma=0.5,
    )
    settings, noise, row = settings_of(run, backbone.mean_embedding_norm()), Noise(3, 4), pack(examples)
    loss = ptp_loss(prompt, backbone, row, run, settings, noise, PassOptions(2))
    loss.total.backward()
    clean_TH = backbone.embed(row.token_ids)
    delta = torch.zeros_like(clean_TH)
    if run.perturbs:
        shared = SharedPass(backbone, prompt, row, clean_TH)
        delta = PERTURBATIONS[perturbation].find(shared, row, clean_TH, settings, noise).detach()
        assert float(delta.norm()) > 0
    plain, total, model = prompt.detach().clone().requires_grad_(), 0.0, make_model(family)
    for example, part in zip(examples, delta.split(row.lengths), strict=True):
        clean = cached_scores(model, plain, example)
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        if run.perturbs:
            perturbed = cached_scores(model, plain, example, part[: len(example.context_ids)])
            total = total + divergence("sym_kl", clean, perturbed, example.gold)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, expected) < 1e-4


def test_text_twins_behind_a_deep_prompt():
    examples, backbone = make_examples("multi"), Backbone(make_model("llama"), prompt="deep")
    contexts = [[(token + 1) % 96 for token in example.context_ids] for example in examples]
    prompt, run = (
        deep_prompt(backbone.model).requires_grad_(),
        RunConfig(perturbation="mask", prompt="deep", divergence_gradient="both"),
    )
    row = pack_text_twins(examples, contexts)
    ptp_loss(prompt, backbone, row, run, settings_of(run, 1.0), Noise(0, 0)).total.backward()
    plain, total, model = prompt.detach().clone().requires_grad_(), 0.0, make_model("llama")
    for example, context in zip(examples, contexts, strict=True):
        clean = cached_scores(model, plain, example)
        perturbed = cached_scores(model, plain, replace(example, context_ids=context))
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        total = total + divergence("kl", clean, perturbed, example.gold)
    assert relative_error(prompt.grad, torch.autograd.grad(total, plain)[0]) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deep_prompt_starts_as_the_soft_one(family):
    """Its start is the soft prompt's own keys and values: the same scores, windows and soft caps included."""
    backbone, examples, soft = Backbone(make_model(family)), make_examples("multi"), make_prompt()
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    deep = join_deep(backbone.cache_prefix(soft), backbone.model.config)
    assert deep.shape == (5, prompt_width("deep", backbone.model.config))
    expected = [plain_scores(make_model(family), soft, example) for example in examples]
    backbone.prompt = "deep"
    for scores in (
        score_examples(backbone, deep, examples, ranks, 4096),
        score_examples(backbone, deep, examples, ranks, 1),
    ):
        for row, wanted in zip(scores, expected, strict=True):
            torch.testing.assert_close(row[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)


def test_join_is_the_inverse_of_split():
    model = make_model("llama")
    prompt = deep_prompt(model)
    assert torch.equal(join_deep(split_deep(prompt, model.config), model.config), prompt)
    with pytest.raises(ValueError, match="width 7 doesn't fit this model's 64"):
        split_deep(torch.zeros(5, 7), model.config)


def test_uneven_layers_are_refused():
    """Two attention calls in a layer, and latent attention, whose keys are wider than its values."""
    config = make_model("llama").config
    pair, latent = [(torch.zeros(5, 2, 8), torch.zeros(5, 2, width)) for width in (8, 6)]
    for layers in ({0: [pair], 1: [pair, pair]}, {0: [latent], 1: [latent]}, {0: [pair]}):
        with pytest.raises(ValueError, match=r"one attention call in each of the 2 layers.*use --prompt soft"):
            join_deep(layers, config)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_peft_loads_it_and_computes_with_it(tmp_path, tiny_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    prompt = deep_prompt(base)
    write_adapter(tmp_path / "adapter", prompt, str(tiny_model), load_config(tiny_model), {}, "deep")
    assert adapter_kind(tmp_path / "adapter") == "deep"
    assert torch.equal(read_adapter(tmp_path / "adapter", prompt.shape[1], 5, "deep"), prompt)
    with pytest.raises(ValueError, match="holds a deep prompt; set --prompt deep"):
        read_adapter(tmp_path / "adapter", kind="soft")
    ids = torch.tensor([[10, 20, 30]])
    example = replace(make_examples("single")[0], context_ids=[10, 20, 30], candidate_ids=[[1], [2]])
    wanted = cached_scores(base, prompt, example)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(theirs[[1, 2]], wanted, atol=1e-5, rtol=1e-5)


def test_training_evaluating_and_resuming(run_train, tiny_model, tmp_path):
    """On two ranks under ZeRO-3 as on one; the adapter scores what training's evaluation reported."""
    import json

    from safetensors.torch import load_file

    prompts = []
    for nproc in (1, 2):
        out = tmp_path / str(nproc)
        done = run_train(
            ["--model", tiny_model, "--task", "RTE", "--prompt", "deep", "--perturbation", "pgd", "--max_steps", "3",
             "--prompt_length", "4", "--output_dir", out], nproc=nproc,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        prompts.append(load_file(out / "checkpoints" / "step-000003" / "state.safetensors")["prompt"])
    assert prompts[0].shape == (4, 64)
    assert float((prompts[1] - prompts[0]).norm() / prompts[0].norm()) < 1e-5
    result = json.loads((tmp_path / "1" / "result.json").read_text())
    given = ["--adapter", tmp_path / "1" / "adapter", "--model", tiny_model, "--json", tmp_path / "again.json"]
    done = run_script("evaluate.py", given)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["metrics"] == result["metrics"]
    assert again["cross_entropy"] == pytest.approx(result["eval_cross_entropy"], abs=1e-5)
