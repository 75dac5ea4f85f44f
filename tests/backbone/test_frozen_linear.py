"""Products with frozen weights: torch's own values and gradients, nothing kept but the weight, and where they apply."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ptp_ds.backbone import frozen_linear
from ptp_ds.backbone.activations import SavedBytes
from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.check import check_backbone
from ptp_ds.backbone.frozen_linear import (
    FrozenLinear,
    explain_product,
    onednn,
    product_for,
    replace_products,
    suits_onednn,
    torchs,
    trial,
)
from ptp_ds.backbone.layerwise import _LayerWork
from ptp_ds.backbone.sharded_loading import build_sharded, fill_randomly
from ptp_ds.config.ds_config import read_ds_config, resolve_ds_config
from ptp_ds.config.run_config import RunConfig
from ptp_ds.packing.row import pack
from tests.support.packed import make_prompt
from tests.support.reference import make_examples, make_model, relative_error

CPU = torch.device("cpu")
PRODUCTS = [torchs, pytest.param(onednn, marks=pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"))]  # fmt: skip


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def every_product(monkeypatch):
    """oneDNN for the smallest product too, on every maker's processor."""
    monkeypatch.setattr(frozen_linear, "_LEAST", 0)
    monkeypatch.setattr(frozen_linear, "_refusal", lambda: "")


@pytest.mark.parametrize("turned", [False, True])
def test_gradcheck(turned):
    x, weight, bias = numbers(2, 3, 5, dtype=torch.float64).requires_grad_(), numbers(4, 5), numbers(4)
    weight = (weight.t().contiguous() if turned else weight).double()
    assert torch.autograd.gradcheck(lambda x: FrozenLinear.apply(x, weight, bias.double(), turned, F.linear), [x])


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 7, 33, 5), (1, 300, 576, 192), (2, 65, 64, 1536), (1, 0, 8, 8), (1, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_values_and_gradients_are_torchs(product, shape, kind, every_product):
    """Against fp64; the input not contiguous, the gradient too."""
    rows, tokens, wide, out = shape
    torch.manual_seed(0)
    module = Conv1D(out, wide) if kind == "conv1d" else nn.Linear(wide, out, bias=kind == "linear")
    module.requires_grad_(False)
    x = numbers(tokens, rows, wide).transpose(0, 1).requires_grad_()
    grad = numbers(rows, out, tokens).transpose(1, 2)
    found = FrozenLinear.apply(x, module.weight, module.bias, kind == "conv1d", product)
    to_input = torch.autograd.grad(found, x, grad)[0]
    exact = module.double()
    wide_x = x.detach().double().requires_grad_()
    wanted = F.linear(wide_x, exact.weight.t() if kind == "conv1d" else exact.weight, exact.bias)
    if tokens:
        assert relative_error(found.detach(), wanted.detach()) < 1e-6
        assert relative_error(to_input, torch.autograd.grad(wanted, wide_x, grad.double())[0]) < 1e-6
    assert (found.shape, to_input.shape) == (wanted.shape, x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_torchs_product_is_f_linear_less_what_deepspeed_puts_there(dtype, biased, monkeypatch):
    x, weight, bias = numbers(65, 96, dtype=dtype), numbers(40, 96, dtype=dtype), numbers(40, dtype=dtype)
    bias = bias if biased else None
    wanted = F.linear(x, weight, bias), F.linear(x, weight.t().contiguous().t(), bias)
    monkeypatch.setattr(F, "linear", None)
    for given, expected in zip((weight, weight.t().contiguous().t()), wanted, strict=True):
        assert torch.equal(torchs(x, given, bias), expected)


def test_products_under_zero3_are_one_node_each(ranks):
    """zero.Init has put DeepSpeed's linear in F.linear's place: no layer of ours, nor the narrowed head, goes there."""
    run = RunConfig(ds_config="ds_configs/zero3.json", precision="fp32")
    resolved = resolve_ds_config(read_ds_config(run.ds_config), run, set(), 1, 32)
    model = build_sharded(make_model("llama").config, resolved)
    assert F.linear is not torch._C._nn.linear
    fill_randomly(model)
    backbone, made = Backbone(model), []
    run_section = _LayerWork._run

    def noting(work, section, span, x):
        held = run_section(work, section, span, x)
        if not section.chunk.is_prefix and work.number == 0:
            made.append(nodes_behind(held.output))
        return held

    prompt = make_prompt().requires_grad_()
    row = pack(make_examples("single"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_LayerWork, "_run", noting)
        with backbone.shards.outside_layers():
            logits = backbone.score(row.narrowed(), backbone.inputs(row, prompt), prompt)
            outer = nodes_behind(logits)
    (layer,) = made
    assert layer["FrozenLinearBackward"] == 7, "q, k, v, o, gate, up, down"
    assert not any("ZeroStage3" in name for name in [*layer, *outer])
    # The family's own: q, k and v into heads, and back. None for a product.
    assert layer["ViewBackward0"] + layer["UnsafeViewBackward0"] <= 4, layer


def nodes_behind(tensor):
    """How many autograd nodes of each name lie behind a tensor."""
    seen, open_nodes = set(), [tensor.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_nodes += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


def test_an_output_may_be_changed_in_place():
    """Some families add to what a layer gives: it must be no view."""
    weight, x = numbers(4, 8), numbers(1, 3, 8).requires_grad_()
    out = FrozenLinear.apply(x, weight, None, False, torchs).add_(1.0)
    torch.testing.assert_close(out, x @ weight.t() + 1.0)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], weight.sum(0).expand(1, 3, 8))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_by_onednn_is_the_model(family, every_product):
    """gpt2 has Conv1D and biases. The start-up check compares packed with plain; here plain ones with torch's own."""
    ids = torch.arange(40)[None] % 96
    model, ours = make_model(family), make_model(family)
    wanted = model(ids).logits
    backbone = Backbone(ours)
    check_backbone(backbone)
    backbone.release()
    ours.set_attn_implementation("eager")
    assert all("forward" in vars(m) for m in ours.modules() if type(m) in (nn.Linear, Conv1D) and m is not ours.lm_head)
    torch.testing.assert_close(ours(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_nothing_is_kept_for_backward():
    """An ordinary linear would keep its input for a weight that asks for a gradient, ZeRO-3's does in any case."""
    layer = nn.Linear(8, 4)
    x = numbers(3, 8).requires_grad_()
    plain, ours = SavedBytes(iter([])), SavedBytes(iter([]))
    with plain.counting():
        layer(x)
    layer.requires_grad_(False)
    with ours.counting():
        FrozenLinear.apply(x, layer.weight, layer.bias, False, F.linear)
    assert ours.total == 0 < plain.total


def test_the_weight_is_read_when_backward_comes():
    """As under ZeRO-3: its data of the forward is released, what backward finds in the parameter is what counts."""
    weight = nn.Parameter(numbers(4, 8), requires_grad=False)
    gathered_again, x = 2 * weight.data, numbers(3, 8).requires_grad_()
    out = FrozenLinear.apply(x, weight, None, False, F.linear)
    weight.data = gathered_again
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], gathered_again.sum(0).expand(3, 8))


def test_small_products_stay_with_torch():
    """For the time of a call."""
    large = numbers(4096, 768)
    assert suits_onednn(large, numbers(64, 768))
    assert not suits_onednn(large[:1], numbers(64, 768))


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")),
    reason="no oneDNN with AVX-512, where alone it is taken",
)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("terms", [769, 1536, 3000, 8192])
def test_long_sums_round_as_short_ones(terms, turned, every_product):
    """oneDNN's own rounding grows with the length of a sum, see test_embedded_model.py for what that did to a step."""
    x, weight = numbers(257, terms), numbers(96, terms)
    weight = weight.t().contiguous().t() if turned else weight
    exact = x.double() @ weight.double().t()
    found = onednn(x, weight)
    at_once = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    assert relative_error(found, exact) < max(4.5e-7, 0.9 * relative_error(at_once, exact))


def test_a_trained_layer_is_itself(every_product):
    layer = nn.Linear(8, 4)
    assert replace_products([layer], "auto", False) == 1
    layer(numbers(3, 8)).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None  # noqa: PT018
    frozen = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    x = numbers(3, 8).requires_grad_()
    swapped = torch.func.functional_call(layer, frozen, (x,))
    assert type(swapped.grad_fn).__name__ == "FrozenLinearBackward"


def test_where_onednn_is_taken(monkeypatch):
    """One rule for all ranks and runs of a machine, by its processor: nothing is timed."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for maker, taken in (("AuthenticAMD", True), ("GenuineIntel", False), ("", False)):
        frozen_linear._refusal.cache_clear()
        monkeypatch.setattr(frozen_linear, "_maker", lambda maker=maker: maker)
        assert (product_for("auto", CPU, torch.float32)[0] is onednn) is (
            taken and torch.backends.mkldnn.is_available()
        )
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(frozen_linear, "_maker", lambda: "AuthenticAMD")
    frozen_linear._refusal.cache_clear()
    assert explain_product("auto", CPU, torch.float32).startswith("torch's own (MKL leaves no AVX-512 out")
    frozen_linear._refusal.cache_clear()
    monkeypatch.setattr(frozen_linear, "_refusal", lambda: "")
    assert explain_product("auto", CPU, torch.float32) == "oneDNN's, AVX-512"
    assert explain_product("torch", CPU, torch.float32) == "torch's own (--kernels torch)"
    assert product_for("auto", CPU, torch.bfloat16)[0] is torchs
    assert product_for("triton", torch.device("cuda"), torch.float32)[0] is torchs


def test_an_operation_that_computes_something_else_is_refused():
    def wrong(x, weight, bias, *_):
        return F.linear(x, weight, bias) * 1.001

    def transposed(x, weight, bias, *_):
        return F.linear(x, weight.contiguous().view(weight.shape[::-1]).t(), bias)

    def absent(*_):
        raise RuntimeError("no such operator\nbacktrace")

    def changed(x, weight):
        return F.linear(x, weight)

    assert trial(lambda x, weight, bias, *_: F.linear(x, weight, bias)) == ""
    assert "differs by 1e-03" in trial(wrong)
    assert "differs" in trial(transposed)
    assert trial(absent) == "oneDNN's fails here: no such operator"
    assert "fails here" in trial(changed)


def test_layers_stay_as_they_are_where_nothing_is_gained(monkeypatch):
    monkeypatch.setattr(frozen_linear, "_refusal", lambda: "MKL")
    layer = nn.Linear(4, 4).requires_grad_(False)
    assert replace_products([layer], "auto", False) == 0
    assert "forward" not in vars(layer)
    assert replace_products([layer], "auto", True) == 1, "under ZeRO-3 it keeps less"
