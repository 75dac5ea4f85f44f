"""Models whose products are joined: plain eager passes' scores and gradients, fewer products, weights as they were."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from ptp_ds.backbone import joint_products
from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.adjacent import joined, lay_together
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone, checked_backbone
from ptp_ds.backbone.frozen_linear import torchs
from ptp_ds.backbone.joint_products import Siblings, join_products
from ptp_ds.backbone.sharding import Shards
from ptp_ds.config.run_config import RunConfig
from ptp_ds.models.heads import Head
from ptp_ds.packing.row import pack
from ptp_ds.perturb import PERTURBATIONS, Noise, SharedPass
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.chip import WAITS
from tests.support.deep_prompts import WINDOWED, cached_scores, deep_prompt
from tests.support.memory import peak_of
from tests.support.packed import divergence, make_prompt, plain_step, symmetric_run
from tests.support.paths import ROOT, SUPPORT
from tests.support.products import Products
from tests.support.reference import FAMILIES as SHAPES
from tests.support.reference import make_examples, make_model, plain_scores, relative_error
from tests.support.runs import QUICK, check, last_prompt
from tests.support.seq2seq import make_seq2seq
from tests.support.zygote import run_script

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt2")
GATED, QKV = "gate_proj+up_proj (2 times)", "q_proj+k_proj+v_proj (2 times)"


def joint(family, activations="keep", prompt="soft", model=None):
    """A backbone that has joined what it can."""
    backbone = Backbone(model or make_model(family), Activations(activations, chunk_tokens=30), prompt, joint=True)
    join_products(backbone)
    return backbone


def said(family):
    """What a family's line says."""
    none = "each alone, since no two share an input"
    return none if family == "gpt2" else f"one for {QKV}, {GATED}"


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("perturbation", ["none", "gaussian", "pgd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_that_of_plain_eager_passes(family, perturbation, activations):
    """Loss and prompt gradient, clean and perturbed, by one forward a candidate of a model without joint products."""
    backbone, examples = joint(family, activations), make_examples("ragged")
    assert backbone.joined == said(family)
    prompt = make_prompt().requires_grad_()
    run = symmetric_run(perturbation, epsilon=0.5, sigma=0.5)
    settings, noise, row = settings_of(run, backbone.mean_embedding_norm()), Noise(3, 4), pack(examples)
    loss = ptp_loss(prompt, backbone, row, run, settings, noise, PassOptions(2)).total
    loss.backward()
    delta = None
    if perturbation != "none":
        clean = backbone.embed(row.token_ids)
        delta = PERTURBATIONS[perturbation].find(SharedPass(backbone, prompt, row, clean), row, clean, settings, noise)
    plain = prompt.detach().clone().requires_grad_()
    total = plain_step(family, plain, examples, delta, "sym_kl", 0.7)
    torch.testing.assert_close(loss.detach(), total.detach(), atol=1e-4, rtol=1e-5)
    assert relative_error(prompt.grad, torch.autograd.grad(total, plain)[0]) < 1e-4
    assert not any(one.parts for group in groups_of(backbone) for one in group._waiting.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_eager_model(family):
    backbone, model, prompt = joint(family), make_model(family), make_prompt()
    examples = make_examples("multi")
    row = pack(examples)
    with torch.no_grad():
        scores = backbone.score(row, backbone.embed(row.token_ids), prompt)[0]
        cached = backbone.score(row, backbone.embed(row.token_ids), prefix=backbone.cache_prefix(prompt))[0]
        for number, example in enumerate(examples):
            wanted = plain_scores(model, prompt, example)
            torch.testing.assert_close(scores[number, : len(wanted)], wanted, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(cached, scores, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WINDOWED))
def test_a_deep_prompts_gradient_is_that_of_the_familys_own_cache(family, activations):
    backbone, examples = joint(family, activations, "deep"), make_examples("ragged")
    prompt = deep_prompt(backbone.model).requires_grad_()
    run = symmetric_run("gaussian", prompt="deep", sigma=0.5)
    settings, noise, row = settings_of(run, backbone.mean_embedding_norm()), Noise(3, 4), pack(examples)
    ptp_loss(prompt, backbone, row, run, settings, noise, PassOptions(2)).total.backward()
    clean_TH = backbone.embed(row.token_ids)
    delta = PERTURBATIONS["gaussian"].find(SharedPass(backbone, prompt, row, clean_TH), row, clean_TH, settings, noise)
    plain, total, model = prompt.detach().clone().requires_grad_(), 0.0, make_model(family)
    for example, part in zip(examples, delta.split(row.lengths), strict=True):
        clean = cached_scores(model, plain, example)
        perturbed = cached_scores(model, plain, example, part[: len(example.context_ids)])
        total = total + F.cross_entropy(clean[None], torch.tensor([example.gold]))
        total = total + 0.7 * divergence("sym_kl", clean, perturbed, example.gold)
    assert relative_error(prompt.grad, torch.autograd.grad(total, plain)[0]) < 1e-4


def deeper(layers):
    config = AutoConfig.for_model("llama", **{**SHAPES["llama"], "num_hidden_layers": layers})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)


def groups_of(backbone):
    """The groups whose layers call them."""
    found = {}
    for module in backbone.model.modules():
        call = vars(module).get("forward")
        owner = getattr(getattr(call, "func", None), "__self__", None)
        if isinstance(owner, Siblings):
            found[id(owner)] = owner
    return list(found.values())


@pytest.mark.parametrize(("activations", "alone", "together"), [
    ("keep", (7, 7, 5), (4, 5, 2)), ("recompute", (7, 13, 6), (4, 8, 3)),
])  # fmt: skip
def test_products_and_sums_a_layer(activations, alone, together):
    """The forward's products, the backward's products and sums, of one section behind a given prompt: what four layers
    have more than two. Nothing is read by the host.

    Of seven, queries', keys' and values' are one, gate's and up's are one; backward those of gate and up are two, the
    second added to the first. Recomputation stops before the last one, behind which nothing is kept.
    """
    for wanted, counts in ((False, alone), (True, together)):
        found = []
        for layers in (2, 4):
            backbone = Backbone(deeper(layers), Activations(activations), kernels="torch", joint=wanted)
            join_products(backbone)
            row = pack(make_examples("single")[:1])
            embeds = backbone.embed(row.token_ids).requires_grad_()
            cache = backbone.cache_prefix(make_prompt())
            with Products() as forward:
                total = backbone.score(row, embeds, prefix=cache)[0][0].cos().sum()
            with Products() as backward:
                total.backward()
            assert not (forward.times.keys() | backward.times.keys()) & WAITS
            found.append((forward.products, backward.products, backward.times["add"]))
        assert tuple((more - less) / 2 for less, more in zip(*found, strict=True)) == counts


def test_weights_are_there_once_and_unchanged():
    """Values to the bit, names, tied embeddings, and the bytes of all storages together."""
    model, before = make_model("qwen2"), make_model("qwen2")
    model.tie_weights()
    size = bytes_of(model)
    backbone = joint("qwen2", model=model)
    check_backbone(backbone)
    assert bytes_of(model) == size
    for (name, found), (wanted_name, wanted) in zip(
        model.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert name == wanted_name
        assert torch.equal(found, wanted), name
    attention = model.model.layers[0].self_attn
    parts = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    for kind in ("weight", "bias"):
        assert joined([getattr(part, kind) for part in parts]) is not None
    ids = torch.arange(40)[None] % 96
    backbone.release()
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, before(ids).logits, atol=1e-5, rtol=1e-5)
    model.load_state_dict(make_model("qwen2").state_dict())
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, before(ids).logits, atol=1e-5, rtol=1e-5)


def bytes_of(model):
    memories = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(memories.values())


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_step_takes_hardly_more_memory(activations):
    """Its peak, and nothing of it is alive behind it."""
    peaks = []
    for wanted in (False, True):
        backbone = Backbone(make_model("llama"), Activations(activations), joint=wanted)
        join_products(backbone)
        row, prompt = pack(make_examples("ragged")), make_prompt().requires_grad_()
        run = RunConfig(perturbation="gaussian", sigma=0.5)

        def step(backbone=backbone, row=row, prompt=prompt, run=run):
            ptp_loss(prompt, backbone, row, run, settings_of(run, 1.0), Noise(3, 4)).total.backward()

        known = [*backbone.parameters(), *backbone.buffers()]
        peaks.append(peak_of(step, known))
        assert not any(one.parts for group in groups_of(backbone) for one in group._waiting.values())
    # Values are columns beside queries and keys, which stay with them through one chunk's backward.
    assert peaks[1] <= (1.05 if activations == "keep" else 1.1) * peaks[0]


def test_cross_attention_joins_what_shares_an_input():
    """bart's queries of its encoder's keys come from the decoder."""
    backbone, reason = checked_backbone(Backbone(make_seq2seq("bart"), head=Head("seq2seq"), joint=True))
    assert "isn't packed" in str(reason)
    assert backbone.joined == "one for k_proj+v_proj+q_proj (4 times), k_proj+v_proj (2 times)"
    check_backbone(backbone)


def test_it_is_off_on_a_cpu_and_where_weights_are_gathered(monkeypatch):
    backbone = Backbone(make_model("llama"))
    check_backbone(backbone)
    assert backbone.joined == "each alone"
    assert not groups_of(backbone)
    monkeypatch.setattr(Shards, "sharded", True)
    gathered = Backbone(make_model("llama"), joint=True)
    join_products(gathered)
    assert gathered.joined == "each alone, since weights are gathered"


@pytest.mark.parametrize("how", ["value", "gradient", "fails"])
def test_a_family_that_computes_something_else_then_keeps_its_own(how, monkeypatch):
    own = joint_products.input_gradient
    if how == "gradient":
        monkeypatch.setattr(joint_products, "input_gradient", lambda *given: 1.001 * own(*given))
    else:

        def wrong(x, weight, bias):
            if how == "fails":
                raise RuntimeError("view size is not compatible")
            return 1.001 * torchs(x, weight, bias)

        monkeypatch.setattr(joint_products, "product_for", lambda *_: (wrong, ""))
    backbone = Backbone(make_model("llama"), joint=True)
    before = {name: vars(module).get("forward") for name, module in backbone.model.named_modules()}
    join_products(backbone)
    assert backbone.joined == "each alone, since one for all differs here"
    assert {name: vars(module).get("forward") for name, module in backbone.model.named_modules()} == before
    check_backbone(backbone)


def test_layers_whose_weights_cant_be_moved_keep_their_own(monkeypatch):
    """For want of memory: the rest is joined."""

    def lay(parameters):
        if parameters[0].shape[0] == 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lay_together(parameters)

    monkeypatch.setattr(joint_products, "lay_together", lay)
    backbone = joint("llama")
    assert backbone.joined == f"one for {QKV}"
    assert all(torch.equal(a, b) for a, b in zip(backbone.model.parameters(), make_model("llama").parameters(),
                                                 strict=True))  # fmt: skip
    check_backbone(backbone)


def test_a_model_that_tokens_alone_dont_run_keeps_its_own(monkeypatch):
    backbone = Backbone(make_model("llama"), joint=True)
    monkeypatch.setattr(backbone.model, "forward", None)
    join_products(backbone)
    assert backbone.joined == "each alone, since no two share an input"
    assert not any(module._forward_pre_hooks for module in backbone.model.modules())


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [pytest.param("zero3", 1, marks=pytest.mark.slow), ("zero3", 2), pytest.param("zero2", 1, marks=pytest.mark.slow)],
)
def test_training_with_joint_products(stage, ranks, tiny_model, tmp_path):
    """The prompt of a run without them, but for rounding."""
    prompts = {}
    for name, script in (("apart", "train.py"), ("joint", SUPPORT / "joint_train.py")):
        out = tmp_path / name
        flags = [*QUICK, "--model", tiny_model, "--max_steps", "3", "--perturbation", "pgd", "--precision", "fp32",
                 "--lr", "0.01", "--ds_config", ROOT / "ds_configs" / f"{stage}.json", "--output_dir", out]  # fmt: skip
        done = check(run_script(script, flags, tmp_path, ranks))
        assert ("one for q_proj+k_proj+v_proj (2 times)" in done.stdout) is (name == "joint")
        assert ("each alone" in done.stdout) is (name == "apart")
        prompts[name] = last_prompt(out)
    assert not torch.equal(prompts["joint"], prompts["apart"]), "rounding differs"
    assert relative_error(prompts["joint"], prompts["apart"]) < 1e-4
