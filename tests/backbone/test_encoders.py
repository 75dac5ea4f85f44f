"""Encoders on the packed path against plain per-example forwards of the eager model: scores, gradients, deltas."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.layouts import SeparateRows
from ptp_ds.perturb import PERTURBATIONS, Noise
from ptp_ds.perturb.ball import example_norm
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.encoders import (
    ENCODERS,
    KINDS,
    PROMPT,
    make_backbone,
    make_encoder,
    make_values,
    plain_scores,
    plain_step,
)
from tests.support.packed import divergence, symmetric_run
from tests.support.reference import make_examples, make_model, relative_error

CASES = [("masked", False, "single"), ("masked", False, "ragged"), ("classes", False, "single"),
         ("classes", True, "ragged")]  # fmt: skip


@pytest.mark.parametrize(("kind", "choice", "shape"), CASES)
@pytest.mark.parametrize("family", ENCODERS)
def test_scores_and_gradients(family, kind, choice, shape):
    backbone, examples = make_backbone(family, kind, choice=choice), make_examples(shape)
    trained = make_values(backbone).requires_grad_()
    row = backbone.rows.pack(examples)
    scores = backbone.score(row, backbone.inputs(row, trained), trained)[0]
    (gradient,) = torch.autograd.grad(sum(s[: len(e.candidate_ids)].log_softmax(-1)[-1] for s, e in zip(scores, examples, strict=True)), trained)  # fmt: skip # noqa: E501
    model, plain = make_encoder(family, kind, 1 if choice else 3), trained.detach().clone().requires_grad_()
    expected = [plain_scores(model, kind, plain, backbone.head, example, choice=choice) for example in examples]
    for number, example in enumerate(examples):
        count = len(example.candidate_ids)
        torch.testing.assert_close(scores[number, :count], expected[number], atol=1e-5, rtol=1e-5)
        assert bool(torch.isneginf(scores[number, count:]).all())
    (wanted,) = torch.autograd.grad(sum(s.log_softmax(-1)[-1] for s in expected), plain)
    assert relative_error(gradient, wanted) < 1e-4


@pytest.mark.parametrize(("kind", "choice", "shape"), CASES)
@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "modernbert"])
@pytest.mark.parametrize("perturbation", ["gaussian", "pgd", "free"])
def test_step_gradient(family, kind, choice, shape, perturbation):
    """The same delta on an example's context wherever its blocks repeat it, and nowhere else."""
    backbone, examples = make_backbone(family, kind, choice=choice), make_examples(shape)
    trained = make_values(backbone).requires_grad_()
    run = symmetric_run(perturbation, epsilon=0.5, sigma=0.5)
    settings, row = settings_of(run, backbone.mean_embedding_norm()), backbone.rows.pack(examples)
    loss = ptp_loss(trained, backbone, row, run, settings, Noise(3, 4), PassOptions(2))
    loss.total.backward()
    delta = loss.delta.detach()
    assert float(delta[~row.movable].abs().max()) == 0.0 < float(delta[row.movable].abs().max())
    if perturbation != "gaussian":
        assert float(example_norm(delta, row).max()) <= 0.5 * settings.unit
    deltas = [
        part[PROMPT : PROMPT + len(example.context_ids)]
        for example, part in zip(examples, delta.split(row.lengths), strict=True)
    ]
    plain = trained.detach().clone().requires_grad_()
    total = plain_step(backbone, family, kind, plain, examples, deltas, choice)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(trained.grad, expected) < 1e-4


@pytest.mark.parametrize(("kind", "choice", "shape"), CASES)
@pytest.mark.parametrize("perturbation", ["mask", "mask+gaussian"])
def test_step_gradient_in_text_space(kind, choice, shape, perturbation):
    backbone, examples = make_backbone("bert", kind, choice=choice), make_examples(shape)
    trained = make_values(backbone).requires_grad_()
    run = symmetric_run(perturbation, sigma=0.5, mask_share=0.4)
    settings, noise, how = settings_of(run, backbone.mean_embedding_norm(), 3), Noise(3, 4), PERTURBATIONS[perturbation]
    twins = how.twins(examples, settings, noise)
    movable = [twin.movable for twin in twins] if how.find else None
    row = backbone.rows.pack_twins(examples, [twin.context_ids for twin in twins], movable)
    loss = ptp_loss(trained, backbone, row, run, settings, noise)
    loss.total.backward()
    model, plain, total = make_encoder("bert", kind, 1 if choice else 3), trained.detach().clone().requires_grad_(), 0.0
    parts = loss.delta.split(row.lengths) if loss.delta is not None else [None] * len(examples)
    for example, twin, part in zip(examples, twins, parts, strict=True):
        clean = plain_scores(model, kind, plain, backbone.head, example, choice=choice)
        moved = replace(example, context_ids=twin.context_ids)
        delta = None
        if part is not None:
            half = len(part) // 2  # clean blocks, then as many of the twin
            delta = part[half + PROMPT : half + PROMPT + len(example.context_ids)]
        perturbed = plain_scores(model, kind, plain, backbone.head, moved, delta, choice)
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        total = total + 0.7 * divergence("sym_kl", clean, perturbed, example.gold)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(trained.grad, expected) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ENCODERS)
def test_families_pass_the_start_up_check(family, kind):
    backbone = make_backbone(family, kind)
    before = backbone.rows
    check_backbone(backbone)
    assert backbone.rows is before


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ENCODERS)
def test_deep_prompts_train(family, kind, activations):
    """Keys and values of every layer, also where the family ignores a cache: gradients by finite differences."""
    backbone, examples = make_backbone(family, kind, "deep"), make_examples("single")
    backbone.activations = replace(backbone.activations, mode=activations)
    trained = make_values(backbone).requires_grad_()
    run = RunConfig(perturbation="pgd", prompt="deep", divergence="js", divergence_gradient="both", epsilon=0.3)
    settings, row = settings_of(run, backbone.mean_embedding_norm()), backbone.rows.pack(examples)
    ptp_loss(trained, backbone, row, run, settings, Noise(0, 0)).total.backward()
    assert bool(trained.grad.abs().sum(-1).min() > 0)

    def loss(matrix):
        with torch.no_grad():
            scores = backbone.score(row, backbone.inputs(row, matrix), matrix)[0]
        return -scores.log_softmax(-1)[:, 0].double().sum()

    scores = backbone.score(row, backbone.inputs(row, trained), trained)[0]
    (gradient,) = torch.autograd.grad(-scores.log_softmax(-1)[:, 0].sum(), trained)
    direction = gradient / gradient.norm()
    plain = trained.detach()
    slope = (loss(plain + 1e-2 * direction) - loss(plain - 1e-2 * direction)) / 2e-2
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_deep_prompts_equal_the_families_own_cache(family, kind):
    from transformers import DynamicCache, EncoderDecoderCache  # noqa: F401

    from ptp_ds.prompts.deep import split_deep

    backbone, example = make_backbone(family, kind, "deep"), make_examples("single")[3]
    trained = make_values(backbone)
    row = backbone.rows.pack([example])
    with torch.no_grad():
        scores = backbone.score(row, backbone.inputs(row, trained), trained)[0, 0]
    model, (prompt, tensors) = make_encoder(family, kind), backbone.head.split(trained)
    cache = DynamicCache()
    for layer, ((k, v),) in split_deep(prompt, model.config).items():
        cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], layer)
    behind = [4, 2] if kind == "masked" else [2]
    ids = torch.tensor([[*example.context_ids, *behind]])
    positions = torch.arange(PROMPT, PROMPT + ids.shape[1])[None] + backbone.first_position
    body = getattr(model, model.base_model_prefix)
    real = body.forward
    body.forward = lambda *args, **kwargs: real(*args, **{**kwargs, "past_key_values": cache})
    arguments = {"input_ids": ids, "position_ids": positions,
                 "attention_mask": torch.ones(1, PROMPT + ids.shape[1], dtype=torch.long)}  # fmt: skip
    with torch.no_grad():
        out = torch.func.functional_call(model, tensors, kwargs=arguments).logits[0]
    if kind == "masked":
        log_probs = out[len(example.context_ids)].log_softmax(-1)
        out = torch.stack([log_probs[candidate[0]] for candidate in example.candidate_ids])
    torch.testing.assert_close(scores, out[: len(example.candidate_ids)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "choice", "shape"), CASES)
def test_gradients_that_an_attack_ranks_words_by(kind, choice, shape):
    """At the tokens of each context, summed over the blocks that repeat it, behind each copy of the prompt."""
    from ptp_ds.perturb.text_scoring import TextScorer

    backbone, examples = make_backbone("bert", kind, choice=choice), make_examples(shape)
    trained = make_values(backbone)
    found = TextScorer(backbone, trained, examples, 0, None).gradients()
    model = make_encoder("bert", kind, 1 if choice else 3)
    for example, places, clean in zip(examples, found.places, found.clean, strict=True):
        delta = torch.zeros(len(example.context_ids), 32, requires_grad=True)
        scores = plain_scores(model, kind, trained, backbone.head, example, delta, choice)
        loss = F.cross_entropy(scores[None], torch.tensor([example.gold]))
        (expected,) = torch.autograd.grad(loss, delta)
        assert relative_error(found.packed[places], expected) < 1e-4
        torch.testing.assert_close(clean[: len(scores)], scores.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_rows_of_several_tasks_have_each_its_own_prompt(kind):
    """One pass over both tasks' rows: the scores and gradients of a pass for each with its own prompt."""

    if kind == "causal":
        backbone = Backbone(make_model("llama"), rows=SeparateRows(kind="causal", prompt_length=PROMPT))
    else:
        backbone = make_backbone("bert", "masked")
    examples = [replace(example, prompt=number % 2) for number, example in enumerate(make_examples("ragged"))]
    trained = 0.3 * torch.randn(2 * PROMPT, 32, generator=torch.Generator().manual_seed(2))
    trained.requires_grad_()
    run = RunConfig(perturbation="pgd", divergence="js", divergence_gradient="both", epsilon=0.5)
    settings = settings_of(run, backbone.mean_embedding_norm())
    row = backbone.rows.pack(examples)
    loss = ptp_loss(trained, backbone, row, run, settings, Noise(1, 2))
    loss.total.backward()
    total = 0.0
    for task in (0, 1):
        alone = trained.detach()[task * PROMPT : (task + 1) * PROMPT].clone().requires_grad_()
        mine = [replace(example, prompt=0) for example in examples if example.prompt == task]
        found = ptp_loss(alone, backbone, backbone.rows.pack(mine), run, settings, Noise(1, 2))
        found.total.backward()
        total += float(found.total.detach())
        assert relative_error(trained.grad[task * PROMPT : (task + 1) * PROMPT], alone.grad) < 1e-4
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-5)
