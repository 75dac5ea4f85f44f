"""Invariant 2: a packed pass equals plain per-example passes, for every family, candidate shape and perturbation."""

from dataclasses import replace

import pytest
import torch

from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.objective import cross_entropy_sum, divergence_sum
from ptp_ds.packing.row import pack, pack_text_twins
from ptp_ds.perturb import PERTURBATIONS, Noise, SharedPass
from ptp_ds.perturb.ball import example_norm
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.packed import divergence as plain_divergence
from tests.support.packed import make_prompt, plain_step, plain_twin_gradient, symmetric_run, twin_deltas
from tests.support.reference import FAMILIES, REFUSED, make_examples, make_model, plain_scores, relative_error

SHAPES = ("single", "multi", "ragged")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_clean_scores_and_prompt_gradient(family, shape):
    examples = make_examples(shape)
    model = make_model(family)
    prompt = make_prompt().requires_grad_()
    expected = [plain_scores(model, prompt, example) for example in examples]
    (plain_gradient,) = torch.autograd.grad(sum(scores.log_softmax(-1)[-1] for scores in expected), prompt)
    backbone = Backbone(model)
    row = pack(examples)
    scores = backbone.score(row, backbone.embed(row.token_ids), prompt)[0]
    for number, example in enumerate(examples):
        count = len(example.candidate_ids)
        torch.testing.assert_close(scores[number, :count], expected[number], atol=1e-5, rtol=1e-6)
        assert bool(torch.isneginf(scores[number, count:]).all())
    (gradient,) = torch.autograd.grad(sum(s[: len(e)].log_softmax(-1)[-1] for s, e in zip(scores, expected)), prompt)  # noqa: B905
    assert relative_error(gradient, plain_gradient) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("perturbation", ["gaussian", "uniform", "pgd"])
def test_step_gradient(family, perturbation):
    examples = make_examples("multi")
    backbone = Backbone(make_model(family))
    prompt = make_prompt().requires_grad_()
    run = symmetric_run(perturbation, epsilon=0.5, sigma=0.5)
    settings, noise = settings_of(run, backbone.mean_embedding_norm()), Noise(3, 4)
    row = pack(examples)
    loss = ptp_loss(prompt, backbone, row, run, settings, noise)
    loss.total.backward()
    clean = backbone.embed(row.token_ids)
    shared = SharedPass(backbone, prompt, row, clean)
    delta = PERTURBATIONS[perturbation].find(shared, row, clean, settings, noise)
    assert float(delta[row.movable].abs().min(-1).values.max()) > 0
    plain = prompt.detach().clone().requires_grad_()
    total = plain_step(family, plain, examples, delta, "sym_kl", 0.7)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("perturbation", ["mask", "mask+gaussian"])
def test_step_gradient_in_text_space(family, perturbation):
    """Two contexts an example, one with hidden words; noise, where there is any, on the words that stay."""
    examples, backbone = make_examples("ragged"), Backbone(make_model(family))
    prompt = make_prompt().requires_grad_()
    run = symmetric_run(perturbation, sigma=0.5, mask_share=0.4)
    settings, noise, how = settings_of(run, backbone.mean_embedding_norm(), 3), Noise(3, 4), PERTURBATIONS[perturbation]
    twins = how.twins(examples, settings, noise)
    contexts, movable = [twin.context_ids for twin in twins], [twin.movable for twin in twins]
    assert sum(list(e.context_ids) != list(c) for e, c in zip(examples, contexts, strict=True)) >= 3
    row = pack_text_twins(examples, contexts, movable if how.find else None)
    loss = ptp_loss(prompt, backbone, row, run, settings, noise, PassOptions(2))
    loss.total.backward()
    delta = how.find(None, row, backbone.embed(row.token_ids), settings, noise) if how.find else None
    assert (delta is None) == (perturbation == "mask")
    total, expected = plain_twin_gradient(family, prompt, examples, contexts, twin_deltas(row, twins, delta))
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, expected) < 1e-4


def test_a_text_perturbation_needs_a_row_of_twins():
    row, run = pack(make_examples("single")), RunConfig(perturbation="mask")
    with pytest.raises(ValueError, match="--perturbation mask got a row of 1 streams"):
        ptp_loss(make_prompt(), Backbone(make_model("llama")), row, run, settings_of(run, 1.0), Noise(0, 0))


@pytest.mark.parametrize("kind", ["kl", "sym_kl", "js", "ce"])
@pytest.mark.parametrize("shape", SHAPES)
def test_divergences(kind, shape):
    examples = make_examples(shape)
    backbone = Backbone(make_model("llama"))
    prompt = make_prompt().requires_grad_()
    run = RunConfig(perturbation="gaussian", divergence=kind, divergence_gradient="both", sigma=1.0)
    settings, noise, row = settings_of(run, backbone.mean_embedding_norm()), Noise(0, 0), pack(examples)
    loss = ptp_loss(prompt, backbone, row, run, settings, noise)
    loss.total.backward()
    clean = backbone.embed(row.token_ids)
    shared = SharedPass(backbone, prompt, row, clean)
    delta = PERTURBATIONS["gaussian"].find(shared, row, clean, settings, noise)
    plain = prompt.detach().clone().requires_grad_()
    total = plain_step("llama", plain, examples, delta, kind, 1.0)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, expected) < 1e-4


@pytest.mark.parametrize("perturbation", ["gaussian", "pgd", "mask", "free"])
@pytest.mark.parametrize("kind", ["kl", "js"])
def test_a_clean_prediction_that_is_fixed(kind, perturbation):
    """--divergence_gradient clean_fixed: the gradient is that of plain passes whose clean scores are data."""
    examples, backbone = make_examples("multi"), Backbone(make_model("llama"))
    run = RunConfig(perturbation=perturbation, divergence=kind, divergence_gradient="clean_fixed", reg_weight=0.7,
                    epsilon=0.5, sigma=1.0, mask_share=0.4)  # fmt: skip
    settings, noise, how = settings_of(run, backbone.mean_embedding_norm(), 3), Noise(3, 4), PERTURBATIONS[perturbation]
    contexts = [e.context_ids for e in examples]
    if how.twins is not None:
        contexts = [twin.context_ids for twin in how.twins(examples, settings, noise)]
        row = pack_text_twins(examples, contexts)
    else:
        row = pack(examples)
    found = []
    for gradient in ("clean_fixed", "both"):
        prompt = make_prompt().requires_grad_()
        loss = ptp_loss(prompt, backbone, row, replace(run, divergence_gradient=gradient), settings, noise)
        found.append((loss, torch.autograd.grad(loss.total, prompt)[0]))
    assert torch.equal(found[0][0].total, found[1][0].total)
    plain, total, model = make_prompt().requires_grad_(), 0.0, make_model("llama")
    deltas = [torch.zeros(len(context), 32) for context in contexts]
    if loss.delta is not None:
        parts = found[0][0].delta.detach().split(row.lengths)
        deltas = [part[: len(e.context_ids)] for part, e in zip(parts, examples, strict=True)]
    for example, context, delta in zip(examples, contexts, deltas, strict=True):
        clean = plain_scores(model, plain, example)
        perturbed = plain_scores(model, plain, replace(example, context_ids=context), delta)
        total = total + cross_entropy_sum(clean[None], torch.tensor([example.gold]))
        total = total + 0.7 * plain_divergence(kind, clean.detach(), perturbed, example.gold)
    (expected,) = torch.autograd.grad(total, plain)
    assert relative_error(found[0][1], expected) < 1e-4
    assert relative_error(found[1][1], expected) > 1e-2


@pytest.mark.parametrize("max_rows", [None, 2])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_shared_step_equals_one_pass_over_both(activations, max_rows):
    """Kept clean rows, recomputed activations and micro-batches: the gradient of one pass with the same delta."""
    model = make_model("llama", torch.float64)
    backbone = Backbone(model, Activations(activations))
    prompt = make_prompt(torch.float64).requires_grad_()
    run = RunConfig(perturbation="pgd", divergence="js", divergence_gradient="both", epsilon=0.5)
    settings, row = settings_of(run, 1.0), pack(make_examples("ragged"))
    ptp_loss(prompt, backbone, row, run, settings, Noise(0, 0), PassOptions(max_rows)).total.backward()
    clean = backbone.embed(row.token_ids)
    delta = PERTURBATIONS["pgd"].find(SharedPass(backbone, prompt, row, clean), row, clean, settings, Noise(0, 0))
    plain = prompt.detach().clone().requires_grad_()
    scores = backbone.score(row.with_twin(row), torch.cat([clean, clean + delta]), plain)
    total = cross_entropy_sum(scores[0], row.gold) + divergence_sum("js", scores[0], scores[1], row.gold)
    (expected,) = torch.autograd.grad(total, plain)
    assert relative_error(prompt.grad, expected) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_prefix_equals_prompt_in_the_row(family):
    backbone, row = Backbone(make_model(family)), pack(make_examples("multi"))
    prompt = make_prompt()
    clean = backbone.embed(row.token_ids)
    with torch.no_grad():
        together = backbone.score(row, clean, prompt)
        cached = backbone.score(row, clean, prefix=backbone.cache_prefix(prompt))
    torch.testing.assert_close(cached, together, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass_the_start_up_check(family):
    check_backbone(Backbone(make_model(family)))


@pytest.mark.parametrize("family", REFUSED)
def test_families_outside_the_interface_are_refused_by_name(family):
    with pytest.raises(ValueError, match=f"Model family '{family}'.*can't be served"):
        check_backbone(Backbone(make_model(family)))


def test_check_notices_wrong_attention(monkeypatch):
    """The check can fail: with the prefix hidden from the rows it refuses llama."""
    import ptp_ds.attention.plan as tree_plan

    real = tree_plan.TreePlan._make_mask

    def blind(self, bucket, dtype, groups, window):
        mask = real(self, bucket, dtype, groups, window).clone()
        if bucket >= 0:
            mask[..., : self.prefix_keys - 1] = torch.finfo(dtype).min
        return mask

    monkeypatch.setattr(tree_plan.TreePlan, "_make_mask", blind)
    with pytest.raises(ValueError, match="packed scores differ"):
        check_backbone(Backbone(make_model("llama")))


@pytest.mark.parametrize(("keyword", "value"), [("position_bias", torch.zeros(1)), ("head_mask", torch.ones(4))])
def test_unknown_attention_keywords_are_refused(keyword, value):
    from ptp_ds.attention.interface import Call, _tree_attention, use_call
    from ptp_ds.attention.plan import plan_tree

    row = pack(make_examples("single"))
    q = torch.randn(1, 4, row.num_tokens, 8)
    with use_call(Call(plan_tree(row.blocks, 0, 0, "cpu"))), pytest.raises(ValueError, match=keyword):
        _tree_attention(torch.nn.Identity(), q, q, q, None, scaling=1.0, **{keyword: value})


def test_soft_cap_and_window_matter_here():
    """The settings of reference.FAMILIES are no dead letter: without them the scores are far from the packed ones."""
    example = make_examples("single")[3]
    prompt = make_prompt()
    for family, change in (("gemma2", {"attn_logit_softcapping": None}), ("mistral", {"sliding_window": None})):
        model = make_model(family)
        capped = plain_scores(model, prompt, example)
        for module in [model, *model.modules()]:
            if hasattr(module, "config"):
                for name, value in change.items():
                    setattr(module.config, name, value)
            if hasattr(module, "attn_logit_softcapping"):
                module.attn_logit_softcapping = None
        assert float((plain_scores(model, prompt, example) - capped).abs().max()) > 1e-3


def test_twins_must_match():
    rows = make_examples("single")
    with pytest.raises(ValueError, match="same 5 examples"):
        pack(rows).with_twin(pack(rows[:2]))


def test_norm_of_pgd_delta_stays_in_the_ball_at_every_step():
    """Invariant 3, for each norm: after every ascent step, and nothing moves that must not."""
    backbone, row = Backbone(make_model("llama")), pack(make_examples("multi"))
    prompt, clean = make_prompt(), backbone.embed(row.token_ids)
    unit = backbone.mean_embedding_norm()
    shared = SharedPass(backbone, prompt, row, clean)
    run = RunConfig(perturbation="pgd", epsilon=0.4, alpha=0.3)
    for norm in ("frobenius", "token_l2", "linf"):
        for steps in (1, 2, 3):
            settings = settings_of(replace(run, norm=norm, ascent_steps=steps), unit)
            delta = PERTURBATIONS["pgd"].find(shared, row, clean, settings, Noise(0, 0))
            sizes = {"frobenius": example_norm(delta, row), "token_l2": delta.norm(dim=-1),
                     "linf": delta.abs().amax(-1) * 32**0.5}[norm]  # fmt: skip
            assert 0.2 * unit < float(sizes.max()) <= 0.4 * unit
            assert float(delta[~row.movable].abs().max()) == 0.0


def test_ascent_raises_the_divergence():
    backbone, row = Backbone(make_model("llama")), pack(make_examples("multi"))
    prompt, clean = make_prompt(), backbone.embed(row.token_ids)
    shared, found = SharedPass(backbone, prompt, row, clean), []
    for steps in (1, 4):
        run = RunConfig(perturbation="pgd", epsilon=0.2, alpha=0.1, ascent_steps=steps)
        settings = settings_of(run, backbone.mean_embedding_norm())
        delta = PERTURBATIONS["pgd"].find(shared, row, clean, settings, Noise(0, 0))
        found.append(divergence_sum("kl", *shared.both(delta), row.gold).item())
    noise = PERTURBATIONS["pgd"].find(shared, row, clean, replace(settings, steps=0), Noise(0, 0))
    start = float(divergence_sum("kl", *shared.both(noise), row.gold))
    assert found[1] > found[0] > start
