"""Layers by section: kept, recomputed, chunked and shared passes against plain loops in fp64, and what they compute."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ptp_ds.backbone.activations import Activations
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack, pack_text_twins
from ptp_ds.perturb import PERTURBATIONS, Noise, SharedPass
from ptp_ds.perturb.shared_pass import PassOptions
from ptp_ds.training.step import ptp_loss, settings_of
from tests.support.packed import divergence, make_prompt
from tests.support.reference import FAMILIES, make_examples, make_model, plain_scores, relative_error, with_instruction


class FirstLayer(Activations):
    """As where one layer's activations fit."""

    def recomputed(self, tokens, layers):
        return layers - 1


PATHS = {
    "keep": (Activations(), None),
    "recompute": (Activations("recompute"), None),
    "keep, micro-batches": (Activations(), 2),
    "recompute, small chunks": (Activations("recompute", chunk_tokens=12), None),
    "recompute the first layer": (FirstLayer("auto"), None),
}


def make_double(family):
    """A model in fp64 throughout: llama's own norm rounds to fp32 inside, so it gets one that doesn't."""
    model = make_model(family, torch.float64)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(F.rms_norm, normalized_shape=(32,), weight=module.weight, eps=1e-6)
    return model


def plain_gradient(family, examples, deltas, prompt, kind):
    """Gradient of the summed loss by one eager fp64 forward a candidate and stream."""
    model = make_double(family)
    if family != "gemma2":  # eager attention has its softmax in fp32 whatever the dtype; sdpa stays in fp64
        model.set_attn_implementation("sdpa")
    plain = prompt.detach().clone().requires_grad_()
    total, first = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        clean = plain_scores(model, plain, example)
        perturbed = plain_scores(model, plain, example, deltas[first : first + len(example.context_ids)].double())
        first += example.packed_length
        total = total - clean.log_softmax(-1)[example.gold] + divergence(kind, clean, perturbed, example.gold)
    return torch.autograd.grad(total, plain)[0]


@pytest.mark.parametrize("perturbation", ["gaussian", "pgd", "free"])
@pytest.mark.parametrize("shape", ["single", "ragged"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradient_of_every_path_in_double_precision(family, path, shape, perturbation):
    activations, max_rows = PATHS[path]
    backbone = Backbone(make_double(family), activations)
    prompt = make_prompt(torch.float64).requires_grad_()
    examples = make_examples(shape)
    run = RunConfig(perturbation=perturbation, divergence="sym_kl", divergence_gradient="both", epsilon=0.5, sigma=0.5)
    settings, row, noise = settings_of(run, 1.0), pack(examples), Noise(0, 0)
    ptp_loss(prompt, backbone, row, run, settings, noise, PassOptions(max_rows)).total.backward()
    clean = backbone.embed(row.token_ids)
    shared = SharedPass(backbone, prompt, row, clean, PassOptions(max_rows))
    delta = PERTURBATIONS[perturbation].find(shared, row, clean, settings, noise)
    assert float(delta.abs().max()) > 0
    expected = plain_gradient(family, examples, delta.detach(), prompt, "sym_kl")
    # gemma2 computes its norms and soft caps in fp32 even for fp64 weights
    assert relative_error(prompt.grad, expected) < (1e-5 if family == "gemma2" else 1e-9)


@pytest.mark.parametrize("perturbation", ["gaussian", "pgd"])
@pytest.mark.parametrize("path", ["keep", "recompute, small chunks"])
def test_gradient_with_an_instruction_in_the_prefix(path, perturbation):
    activations, max_rows = PATHS[path]
    backbone, examples = Backbone(make_double("llama"), activations), with_instruction(make_examples("ragged"))
    prompt = make_prompt(torch.float64).requires_grad_()
    run = RunConfig(perturbation=perturbation, divergence="sym_kl", divergence_gradient="both", epsilon=0.5, sigma=0.5)
    settings, row, noise = settings_of(run, 1.0), pack(examples, 3), Noise(0, 0)
    ptp_loss(prompt, backbone, row, run, settings, noise, PassOptions(max_rows)).total.backward()
    clean = backbone.embed(row.token_ids)
    delta = PERTURBATIONS[perturbation].find(SharedPass(backbone, prompt, row, clean), row, clean, settings, noise)
    still = delta.new_zeros(3, delta.shape[1])
    whole = torch.cat([part for delta_b in delta.split(row.lengths) for part in (still, delta_b)])
    assert relative_error(prompt.grad, plain_gradient("llama", examples, whole, prompt, "sym_kl")) < 1e-9


def test_an_instruction_is_computed_once():
    backbone, row = Backbone(make_model("llama")), pack(with_instruction(make_examples("multi")), 3)
    assert row.num_tokens == pack(make_examples("multi")).num_tokens
    seen = count_tokens(backbone)
    run = RunConfig(perturbation="pgd", epsilon=0.5)
    ptp_loss(make_prompt().requires_grad_(), backbone, row, run, settings_of(run, 1.0), Noise(0, 0))
    assert seen[0]["norm"] == 5 + 3 + (run.ascent_steps + 2) * row.num_tokens


def count_tokens(backbone):
    """Tokens that each layer's attention input and feed-forward see, call by call."""
    layers = backbone.model.model.layers
    seen = {number: {"norm": 0, "mlp": 0} for number in range(len(layers))}

    def note(number, name):
        def hook(_module, inputs, _output):
            seen[number][name] += inputs[0].shape[1]

        return hook

    for number, layer in enumerate(layers):
        layer.input_layernorm.register_forward_hook(note(number, "norm"))
        layer.mlp.register_forward_hook(note(number, "mlp"))
    return seen


@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_is_computed_twice(steps):
    """K ascents: prompt and clean rows once, perturbed ones K + 1 times; in the last layer scored positions alone."""
    backbone, row = Backbone(make_model("llama")), pack(make_examples("multi"))
    seen = count_tokens(backbone)
    prompt = make_prompt().requires_grad_()
    run = RunConfig(perturbation="pgd", epsilon=0.5, ascent_steps=steps)
    ptp_loss(prompt, backbone, row, run, settings_of(run, 1.0), Noise(0, 0)).total.backward()
    rows, scored = (steps + 2) * row.num_tokens, (steps + 2) * sum(map(len, row.scored))
    assert seen[0] == {"norm": 5 + rows, "mlp": 5 + rows}
    assert seen[1] == {"norm": 5 + rows + scored, "mlp": scored}


def test_recompute_computes_forward_twice_and_no_more():
    backbone, row = Backbone(make_model("llama"), Activations("recompute")), pack(make_examples("single"))
    seen = count_tokens(backbone)
    run = RunConfig(perturbation="gaussian")
    prompt = make_prompt().requires_grad_()
    ptp_loss(prompt, backbone, row, run, settings_of(run, 1.0), Noise(0, 0)).total.backward()
    assert seen[0]["norm"] == 2 * (5 + 2 * row.num_tokens)
    assert seen[0]["mlp"] < 2 * (5 + 2 * row.num_tokens)  # its last product is not computed again


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("perturbation", ["gaussian", "pgd"])
def test_a_zero_delta_has_no_divergence_at_all(path, perturbation):
    """Invariant 1: both streams take the same operations of the same sizes, so equal inputs give equal bits."""
    activations, max_rows = PATHS[path]
    backbone, row = Backbone(make_model("llama"), activations), pack(make_examples("multi"))
    clean = backbone.embed(row.token_ids)
    shared = SharedPass(backbone, make_prompt().requires_grad_(), row, clean, PassOptions(max_rows))
    if perturbation == "pgd":
        shared.gradient(torch.zeros_like(clean), "kl")
    clean_BC, perturbed_BC = shared.both(torch.zeros_like(clean))
    assert torch.equal(clean_BC, perturbed_BC)


@pytest.mark.parametrize("family", FAMILIES)
def test_module_tree_and_weights_stay_as_they_are(family):
    model = make_model(family)
    names = {name: value.clone() for name, value in model.state_dict().items()}
    Backbone(model)
    assert list(model.state_dict()) == list(names)
    assert all(torch.equal(value, names[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", ["single", "ragged"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_twins_in_double_precision(family, path, shape):
    """Clean rows and changed ones with a shared start: scores and prompt gradient of separate plain passes."""
    examples = make_examples(shape)
    twins = [[*example.context_ids] for example in examples]
    for number, twin in enumerate(twins):  # one unchanged, one changed at its first token, the others behind the middle
        if number == 1:
            twin[0] = (twin[0] + 1) % 96
        elif number > 1:
            place = len(twin) // 2
            twin[place:] = [(token + 5) % 96 for token in twin[place:]][: len(twin)] + [7] * (number == 3)
    row = pack_text_twins(examples, twins)
    assert row.num_tokens < pack(examples).num_tokens + sum(map(len, twins))
    prompt = make_prompt(torch.float64).requires_grad_()
    backbone = Backbone(make_double(family), PATHS[path][0])
    scores = backbone.score(row, backbone.embed(row.token_ids), prompt)
    model = make_double(family)
    model.set_attn_implementation("sdpa")
    plain, total, expected = prompt.detach().clone().requires_grad_(), 0.0, 0.0
    for number, (example, twin) in enumerate(zip(examples, twins, strict=True)):
        for stream, context in enumerate((example.context_ids, twin)):
            wanted = plain_scores(model, plain, replace(example, context_ids=context))
            found = scores[stream, number, : len(wanted)]
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
            weight = torch.arange(1.0, len(wanted) + 1) * (stream + 1)
            total, expected = total + (weight * found).sum(), expected + (weight * wanted).sum()
    ours, theirs = torch.autograd.grad(total, prompt)[0], torch.autograd.grad(expected, plain)[0]
    assert relative_error(ours, theirs) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_backward_fills_a_tensor_to_take_a_part(family):
    """The backward of x[0], or of a slice, makes zeros of the whole: squeeze, split and index_select don't."""
    backbone = Backbone(make_model(family))
    prompt, row = make_prompt().requires_grad_(), pack(make_examples("ragged"))
    run, settings, noise = RunConfig(perturbation="pgd"), settings_of(RunConfig(), 1.0), Noise(0, 0)
    with Operations() as seen:
        ptp_loss(prompt, backbone, row, run, settings, noise).total.backward()
    assert seen.names["mm"] + seen.names["addmm"] > 0
    assert not [name for name in seen.names if name in ("select_backward", "slice_backward")], seen.names


class Operations(TorchDispatchMode):
    """How often each aten operation ran."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))
