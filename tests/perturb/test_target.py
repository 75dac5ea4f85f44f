"""--target prompt and both: each row's own copy of the soft prompt moves, and the gradient is that of plain passes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.commands.one_run import prepare
from ptp_ds.config.checks import require_valid
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import HeadPlan, rows_for
from ptp_ds.packing.layouts import SeparateRows, TreeRows
from ptp_ds.perturb import Noise
from ptp_ds.perturb.ball import example_norm
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.planning.report import plans
from ptp_ds.planning.work import Cluster
from ptp_ds.tasks import load_task
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.encoders import PROMPT, make_backbone, make_encoder, make_values
from tests.support.encoders import plain_scores as encoder_scores
from tests.support.packed import divergence, make_prompt
from tests.support.reference import make_examples, make_model, plain_scores, relative_error


def total_of(scores, examples, deltas):
    """Summed loss (sym_kl, lambda 0.7); scores(example, delta on prompt and context or None) -> [C]."""
    total = 0.0
    for example, delta in zip(examples, deltas, strict=True):
        clean, perturbed = scores(example, None), scores(example, delta)
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        total = total + 0.7 * divergence("sym_kl", clean, perturbed, example.gold)
    return total


@pytest.mark.parametrize("perturbation", ["gaussian", "pgd", "free"])
@pytest.mark.parametrize("target", ["prompt", "both"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_step_gradient(model, target, perturbation):
    examples = make_examples("ragged")
    run = RunConfig(
        perturbation=perturbation,
        target=target,
        divergence="sym_kl",
        divergence_gradient="both",
        reg_weight=0.7,
        epsilon=0.5,
    )
    require_valid(run)
    if model == "bert":
        backbone = make_backbone("bert", "masked")
        trained = make_values(backbone)
        rows = SeparateRows(kind="masked", prompt_length=PROMPT, mask_id=4, tail=(2,), target=target)
    else:
        backbone, trained = Backbone(make_model(model)), make_prompt()
        rows = rows_for(HeadPlan(), load_task("RTE"), None, "soft", PROMPT, target)
    backbone.serve("soft", rows)
    trained = trained.requires_grad_()
    row, settings = rows.pack(examples), settings_of(run, backbone.mean_embedding_norm())
    loss = ptp_loss(trained, backbone, row, run, settings, Noise(3, 4), PassOptions(2))
    loss.total.backward()
    parts = loss.delta.detach().split(row.lengths)
    assert all(float(part[:PROMPT].norm(dim=-1).min()) > 0 for part in parts)
    moved = max(float(part[PROMPT:].abs().max()) for part in parts)
    assert (moved > 0) == (target == "both")
    if perturbation != "gaussian":
        assert float(example_norm(loss.delta.detach(), row).max()) <= 0.5 * settings.unit
    plain = trained.detach().clone().requires_grad_()
    eager = make_encoder("bert", "masked") if model == "bert" else make_model(model)

    def scores(example, delta):
        prompt, words = plain, None
        if delta is not None:
            prompt, words = plain + delta[:PROMPT], delta[PROMPT : PROMPT + len(example.context_ids)]
        if model == "bert":
            return encoder_scores(eager, "masked", prompt, backbone.head, example, words)
        return plain_scores(eager, prompt, example, words)

    total = total_of(scores, examples, parts)
    (expected,) = torch.autograd.grad(total, plain)
    torch.testing.assert_close(loss.total.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(trained.grad, expected) < 1e-4


@pytest.mark.parametrize("change", [{"prompt": "deep"}, {"perturbation": "mask"}])
def test_what_it_is_not_for(change):
    with pytest.raises(ValueError, match="--target both is for soft prompts and deltas in embedding space"):
        require_valid(RunConfig(target="both", **change))


def test_without_a_second_stream_it_has_no_effect(tiny_model):
    """Nor on how rows lie, for what a run says that nothing reads; a plan counts the prompt once then."""
    run = RunConfig(model=str(tiny_model), task="CB", target="prompt")
    layouts = {}
    for name, off in (("none", {"perturbation": "none"}), ("lambda", {"reg_weight": 0.0}), ("size", {"sigma": 0.0})):
        layouts[name] = prepare(replace(run, **off)).rows
    assert layouts == dict.fromkeys(layouts, prepare(replace(run, perturbation="none", target="input")).rows)
    assert layouts["none"] == TreeRows()
    assert isinstance(prepare(run).rows, SeparateRows)
    rates = dict.fromkeys(("interconnect", "local", "memory", "link", "disk", "operations"), 1e12)
    cluster = Cluster(hosts=1, gpus=1, gpu_memory=2**35, **rates)
    prefixes = [plans(cluster, replace(run, **off), set())[1].prefix for off in ({"perturbation": "none"}, {})]
    assert prefixes == [run.prompt_length, 0]


@pytest.mark.slow
def test_a_run(run_train, tiny_model, tmp_path):
    arguments = ["--model", tiny_model, "--task", "CB", "--target", "both", "--perturbation", "free", "--max_steps",
                 "3", "--prompt_length", "4", "--output_dir", tmp_path / "run"]  # fmt: skip
    done = run_train(arguments, nproc=2)
    assert done.returncode == 0, done.stderr[-2000:]
