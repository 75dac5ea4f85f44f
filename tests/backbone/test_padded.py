"""The generic path: families that take no attention function from outside, padded, against plain per-example passes."""

import pytest
import torch

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone, checked_backbone
from ptp_ds.backbone.padded import PaddedBackbone, padding
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.perturb import Noise
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.encoders import GENERIC, PROMPT, make_encoder, make_head, plain_scores, plain_step
from tests.support.encoders import make_values as head_values
from tests.support.packed import make_prompt, symmetric_run
from tests.support.packed import plain_step as causal_step
from tests.support.reference import REFUSED, make_examples, make_model, relative_error
from tests.support.reference import plain_scores as causal_scores


def make_padded(family, kind, choice=False):
    model = make_encoder(family, kind, 1 if choice else 3)
    backbone, reason = checked_backbone(Backbone(model, head=make_head(model, kind, choice)))
    assert reason is not None
    assert family in reason.finding
    assert isinstance(backbone, PaddedBackbone)
    backbone.serve("soft", SeparateRows(kind=kind, prompt_length=PROMPT, mask_id=4, tail=(2,), choice=choice))
    return backbone


@pytest.mark.parametrize(("kind", "choice", "shape"), [("masked", False, "ragged"), ("classes", False, "single"),
                                                       ("classes", True, "multi")])  # fmt: skip
@pytest.mark.parametrize("perturbation", ["gaussian", "pgd"])
@pytest.mark.parametrize("family", GENERIC)
def test_encoders(family, perturbation, kind, choice, shape):
    backbone, examples = make_padded(family, kind, choice), make_examples(shape)
    trained = head_values(backbone).requires_grad_()
    run = symmetric_run(perturbation, epsilon=0.5, sigma=0.5)
    settings, row = settings_of(run, backbone.mean_embedding_norm()), backbone.rows.pack(examples)
    loss = ptp_loss(trained, backbone, row, run, settings, Noise(3, 4))
    loss.total.backward()
    deltas = [
        part[PROMPT : PROMPT + len(example.context_ids)]
        for example, part in zip(examples, loss.delta.detach().split(row.lengths), strict=True)
    ]
    plain = trained.detach().clone().requires_grad_()
    total = plain_step(backbone, family, kind, plain, examples, deltas, choice)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(trained.grad, expected) < 1e-4
    scores = backbone.score(row, backbone.inputs(row, plain), plain)[0]
    for example, found in zip(examples, scores, strict=True):
        wanted = plain_scores(make_encoder(family, kind, 1 if choice else 3), kind, plain, backbone.head, example,
                              choice=choice)  # fmt: skip
        torch.testing.assert_close(found[: len(wanted)], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("perturbation", ["gaussian", "pgd", "free"])
@pytest.mark.parametrize("shape", ["single", "ragged"])
@pytest.mark.parametrize("family", REFUSED)
def test_causal_families(family, shape, perturbation):
    backbone, reason = checked_backbone(Backbone(make_model(family)))
    assert reason is not None
    assert family in reason.finding
    backbone.serve("soft", TreeRows(), 5)
    examples, prompt = make_examples(shape), make_prompt().requires_grad_()
    run = symmetric_run(perturbation, epsilon=0.5, sigma=0.5)
    settings, row = settings_of(run, backbone.mean_embedding_norm()), backbone.rows.pack(examples)
    loss = ptp_loss(prompt, backbone, row, run, settings, Noise(3, 4), PassOptions(2))
    loss.total.backward()
    model, plain, total = make_model(family), prompt.detach().clone().requires_grad_(), 0.0
    for example, part in zip(examples, loss.delta.detach().split(row.lengths), strict=True):
        delta = part[5 : 5 + len(example.context_ids)]
        total = total + causal_step(family, plain, [example], delta, "sym_kl", 0.7)
        assert causal_scores(model, plain, example).shape == (len(example.candidate_ids),)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, expected) < 1e-4


def test_padding():
    layout = padding([2, 3], torch.device("cpu"))
    assert layout.mask.tolist() == [[True, True, False], [True, True, True]]
    assert layout.tokens.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert layout.places.tolist() == [0, 1, 3, 4, 5]


def test_deep_prompts_are_refused():
    backbone, _ = checked_backbone(Backbone(make_model("falcon")))
    with pytest.raises(ValueError, match="--prompt deep needs the packed path, which 'falcon' can't take"):
        backbone.serve("deep", TreeRows("deep"), 5)


def test_a_refused_model_has_its_own_layers_back():
    """Nothing of the packed path stays in it: the same logits as one that never saw it."""
    ids = torch.tensor([[5, 6, 7]])
    refused = Backbone(make_model("bloom"))
    with pytest.raises(ValueError, match="can't be served"):
        check_backbone(refused)
    model = PaddedBackbone(refused).model
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, make_model("bloom")(input_ids=ids).logits)
