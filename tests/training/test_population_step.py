"""Several prompts in one pass: every member's loss, delta and gradient are those of a step of its own."""

from dataclasses import replace

import pytest
import torch

from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import Head
from ptp_ds.packing.forest import join_rows
from ptp_ds.packing.layouts import SeparateRows
from ptp_ds.packing.row import pack
from ptp_ds.perturb import Noise
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.prompts.deep import deep_width
from ptp_ds.training.population_step import MemberStep, population_loss, population_row
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.encoders import make_encoder
from tests.support.reference import make_examples, make_model, relative_error, with_instruction

LENGTHS = (5, 3, 8)  # rows of the members' prompts
SHAPES = ("ragged", "single", "multi")


def members_of(backbone, perturbation, layouts=None, **changes):
    """Three members whose rows, prompt lengths, seeds, sizes, lambdas and divergences differ."""
    layouts = layouts or [backbone.rows] * len(SHAPES)
    unit, found = backbone.mean_embedding_norm(), []
    for number, (shape, divergence) in enumerate(zip(SHAPES, ("kl", "sym_kl", "js"), strict=True)):
        examples = make_examples(shape, seed=number)[: 5 - number]
        examples = with_instruction(examples) if number != 1 else examples
        run = RunConfig(
            perturbation=perturbation, divergence=divergence, seed=number, sigma=0.3 + 0.2 * number,
            reg_weight=0.5 + number, epsilon=0.2 + 0.1 * number,
            divergence_gradient=("both", "clean_fixed")[number % 2], **changes,
        )  # fmt: skip
        settings, noise = settings_of(run, unit, 3), Noise(number, 4)
        how, layout = run.active_perturbation, layouts[number]
        common = layout.shared_start(examples)
        if how is not None and how.twins is not None:
            twins = how.twins(examples, settings, noise)
            movable = [twin.movable for twin in twins] if how.find is not None else None
            row = layout.pack_twins(examples, [twin.context_ids for twin in twins], movable, common)
        else:
            row = layout.pack(examples, common)
        found.append(MemberStep(run, settings, noise, row))
    return found


def prompts_of(width=32):
    generator = torch.Generator().manual_seed(5)
    return [0.3 * torch.randn(length, width, generator=generator) for length in LENGTHS]


def require_equal(backbone, members, prompts, options=PassOptions()):  # noqa: B008 - frozen
    """One pass over all members against a pass of each."""
    trained = torch.cat(prompts).requires_grad_()
    population = population_row(members, [len(prompt) for prompt in prompts])
    together = population_loss(trained, backbone, population, options)
    torch.stack([loss.total for loss in together]).sum().backward()
    for member, prompt, ours, gradient in zip(members, prompts, together, trained.grad.split(LENGTHS), strict=True):
        alone = prompt.clone().requires_grad_()
        how = replace(options, carried=member.carried)
        loss = ptp_loss(alone, backbone, member.row, member.run, member.settings, member.noise, how)
        loss.total.backward()
        for name in ("total", "cross_entropy", "divergence", "delta_norm"):
            torch.testing.assert_close(getattr(ours, name), getattr(loss, name), atol=2e-5, rtol=2e-5)
        assert ours.tokens == loss.tokens
        assert relative_error(gradient, alone.grad) < 2e-5
        assert float(alone.grad.abs().max()) > 1e-3
        if loss.delta is not None:
            torch.testing.assert_close(ours.delta, loss.delta, atol=1e-4, rtol=1e-3)
        if loss.delta is not None and loss.delta.requires_grad:
            torch.testing.assert_close(ours.delta.grad, loss.delta.grad, atol=2e-5, rtol=1e-3)
    return together


@pytest.mark.parametrize("perturbation", ["none", "gaussian", "uniform", "mask", "mask+gaussian", "pgd", "free"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_members_behind_soft_prompts(family, perturbation):
    backbone = Backbone(make_model(family))
    require_equal(backbone, members_of(backbone, perturbation), prompts_of())


@pytest.mark.parametrize("perturbation", ["none", "gaussian", "mask", "pgd"])
def test_members_behind_deep_prompts(perturbation):
    backbone = Backbone(make_model("llama"), prompt="deep")
    prompts = prompts_of(deep_width(backbone.model.config))
    require_equal(backbone, members_of(backbone, perturbation), prompts)


@pytest.mark.parametrize("perturbation", ["none", "gaussian", "mask", "pgd"])
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_members_whose_prompts_stand_in_every_block(kind, perturbation):
    layouts = [SeparateRows(kind=kind, prompt_length=length, mask_id=4, tail=(2,)) for length in LENGTHS]
    if kind == "masked":
        backbone = Backbone(make_encoder("bert", kind), head=Head(kind), rows=layouts[0])
    else:
        backbone = Backbone(make_model("llama"), rows=layouts[0])
    require_equal(backbone, members_of(backbone, perturbation, layouts), prompts_of())


def test_narrow_heads():
    """Where every candidate is one token, logits of the members' tokens alone."""
    backbone = Backbone(make_model("llama"))
    backbone.narrows = True
    members = members_of(backbone, "gaussian")
    members = [replace(m, row=backbone.rows.pack(make_examples("single", n))) for n, m in enumerate(members)]
    assert population_row(members, LENGTHS).row.verbalizers is not None
    require_equal(backbone, members, prompts_of())


@pytest.mark.parametrize("mode", ["keep", "recompute"])
@pytest.mark.parametrize("chunk_tokens", [1, 40])
def test_chunks_and_micro_batches(mode, chunk_tokens):
    """Chunks may hold rows of several members, or end within one's."""
    backbone = Backbone(make_model("qwen3"), Activations(mode, chunk_tokens))
    require_equal(backbone, members_of(backbone, "pgd"), prompts_of(), PassOptions(2))


def test_carried_deltas_are_each_members_own():
    backbone = Backbone(make_model("llama"))
    members = members_of(backbone, "free")
    generator = torch.Generator().manual_seed(7)
    carried = [0.1 * torch.randn(m.row.num_tokens, 32, generator=generator) * m.row.movable[:, None] for m in members]
    members = [replace(member, carried=delta) for member, delta in zip(members, carried, strict=True)]
    for loss, delta in zip(require_equal(backbone, members, prompts_of()), carried, strict=True):
        assert torch.equal(loss.delta.detach(), delta)


def test_rows_of_other_forms_are_not_joined():
    row = pack(make_examples("single"))
    with pytest.raises(ValueError, match="2 forms can't be joined"):
        join_rows([row, row.with_twin(row)], [5, 5])
