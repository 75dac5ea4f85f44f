"""Frozen norms and gated feed-forwards: the family's own values and gradients, and which modules are replaced."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from ptp_ds.backbone import frozen_ops
from ptp_ds.backbone.frozen_ops import FrozenRMSNorm, FrozenRotary, GatedSilu, explain_fused, replace_frozen
from ptp_ds.kernels import liger
from tests.support.reference import make_model

HALVES = {torch.bfloat16, torch.float16}


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(5, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: FrozenRMSNorm.apply(x, weight, 1e-5), [x])
    gate, up = (torch.randn(2, 7, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(GatedSilu.apply, [gate, up])
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    cos, sin = torch.randn(2, 1, 1, 3, 4, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: FrozenRotary.apply(x, cos, sin), [x])


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", {"LlamaRMSNorm", "LlamaMLP"}), ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP"}), ("gemma2", {"Gemma2RMSNorm"}),
     ("gpt2", set()), ("opt", set()), ("phi", set())],
)  # fmt: skip
def test_what_is_replaced(family, expected):
    """gemma2's feed-forward has another activation, the others have LayerNorm: their own code stays."""
    model = make_model(family)
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    modules = [module for module in model.modules() if type(module).__name__ in expected]
    widths = {module: getattr(module, "weight", module_weight(module)).shape[-1] for module in modules}
    before = [module(x[..., : widths[module]]) for module in modules]
    assert set(replace_frozen(model.modules(), list(model.modules()))) == expected
    for module, wanted in zip(modules, before, strict=True):
        torch.testing.assert_close(module(x[..., : widths[module]]), wanted, atol=1e-5, rtol=1e-5)


def module_weight(module):
    return next(module.parameters())


def test_a_norm_that_computes_something_else_is_left_alone():
    class Odd(nn.Module):
        eps = 1e-5

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x):
            return self.weight * (x - x.mean(-1, keepdim=True))

    odd = Odd().requires_grad_(False)
    assert replace_frozen([odd], [odd]) == {}
    assert "forward" not in odd.__dict__


def test_fp64_stays_the_familys():
    model = make_model("llama", torch.float64)
    assert replace_frozen(model.modules(), list(model.modules())) == {}


def test_what_is_served_where():
    """Half precision on a GPU, as training is there."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    served = {(device.type, dtype) for device in (cpu, gpu) for dtype in HALVES | {torch.float32, torch.float64}
              if frozen_ops._served(device, dtype)}  # fmt: skip
    assert served == {("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.float32),
                      ("cuda", torch.bfloat16), ("cuda", torch.float16)}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_half_precision_is_computed_in_fp32_and_rounded_once(family, dtype, monkeypatch):
    """Against the same module in fp64: no farther from it than the family's own, values and gradients."""
    monkeypatch.setattr(frozen_ops, "_served", lambda device, dtype: True)  # fp16 is a GPU's
    model, own = make_model(family, dtype), make_model(family, dtype)
    assert replace_frozen(model.modules(), list(model.modules()))
    compared = 0
    for ours, familys in zip(model.modules(), own.modules(), strict=True):
        if "forward" not in vars(ours) or hasattr(ours, "q_proj"):
            continue
        exact = copy.deepcopy(familys).double()
        width = ours.gate_proj.in_features if hasattr(ours, "gate_proj") else ours.weight.shape[-1]
        x = torch.randn(64, width, generator=torch.Generator().manual_seed(1)).to(dtype)
        results = {}
        for name, module, given in (("ours", ours, x), ("own", familys, x), ("exact", exact, x.double())):
            leaf = given.clone().requires_grad_()
            out = module(leaf)
            (grad,) = torch.autograd.grad(out, leaf, out.detach().cos())
            results[name] = (out.detach().double(), grad.double())
        for mine, theirs, right in zip(results["ours"], results["own"], results["exact"], strict=True):
            assert (mine - right).norm() <= 1.05 * (theirs - right).norm() + 1e-6 * right.norm()
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize(("family", "replaced"), [("llama", True), ("qwen3", True), ("phi", True), ("gpt2", False)])
def test_rotary_positions_are_the_familys(family, replaced):
    """The attention's forward is the family's own with one name rebound; the family's module keeps its function."""
    model = make_model(family)
    replace_frozen(model.modules(), list(model.modules()))
    modules = [module for module in model.modules() if "forward" in module.__dict__ and hasattr(module, "q_proj")]
    assert bool(modules) == replaced
    cos, sin, q, k = torch.randn(4, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for module in modules:
        ours, familys = (
            function.__globals__["apply_rotary_pos_emb"] for function in (module.forward.__func__, type(module).forward)
        )
        assert ours.familys is familys
        for given, wanted in zip(ours(q, k, cos[:, 0], sin[:, 0]), familys(q, k, cos[:, 0], sin[:, 0]), strict=True):
            torch.testing.assert_close(given, wanted)
        assert module.forward.__code__ is type(module).forward.__code__


@pytest.mark.parametrize(
    "odd",
    [
        lambda q, k, cos, sin, unsqueeze_dim=1: (q * cos.unsqueeze(1), k * cos.unsqueeze(1)),
        lambda q, k, cos, sin, unsqueeze_dim=1: (llama_rotary(q, k, cos, sin)[0], k),
        lambda x, k, cos, sin: llama_rotary(x, k, cos, sin),
    ],
)  # fmt: skip
def test_a_rotary_function_that_does_something_else_is_left_alone(odd, monkeypatch):
    model = make_model("llama")
    module = next(module for module in model.modules() if hasattr(module, "q_proj"))
    monkeypatch.setitem(type(module).forward.__globals__, "apply_rotary_pos_emb", odd)
    replace_frozen(model.modules(), list(model.modules()))
    assert "forward" not in module.__dict__


def liger_in_torch(monkeypatch):
    """Stands in for Liger's three functions, with its formulas: which of them are tried and taken is under test."""

    def norms(weight, epsilon):
        def norm(offset, gemma):
            def run(x):
                scaled = x.float() * (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
                if gemma:
                    return (scaled * (weight().float() + offset)).to(x.dtype)
                return scaled.to(x.dtype) * (weight() + offset)

            return run

        return [norm(offset, gemma) for offset in (0.0, 1.0) for gemma in (False, True)]

    def rotary(q, k, cos, sin):
        return llama_rotary(q, k, cos, sin)

    calls = []

    def counted(name, function):
        return lambda *args: (calls.append(name), function(*args))[1]

    monkeypatch.setattr(liger, "available", lambda impl, device, dtype: impl != "torch")
    monkeypatch.setattr(liger, "norms", norms)
    monkeypatch.setattr(liger, "gated_silu", counted("gated", lambda gate, up: nn.functional.silu(gate) * up))
    monkeypatch.setattr(liger, "rotary", counted("rotary", rotary))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "expected", "called"),
    [("llama", {"LlamaRMSNorm", "LlamaMLP"}, {"gated", "rotary"}), ("gemma2", {"Gemma2RMSNorm"}, {"rotary"}),
     ("gpt2", set(), set())],
)  # fmt: skip
def test_on_a_gpu_ligers_take_the_place(monkeypatch, family, expected, called, dtype):
    ids = torch.tensor([[5, 9, 2, 7]])
    wanted = make_model(family, dtype)(ids).logits
    model, calls = make_model(family, dtype), liger_in_torch(monkeypatch)
    assert set(replace_frozen(model.modules(), list(model.modules()))) == expected
    calls.clear()
    found = model(ids).logits
    assert set(calls) == called
    torch.testing.assert_close(found, wanted, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    plain = make_model(family, dtype)
    replace_frozen(plain.modules(), list(plain.modules()), "torch")
    calls.clear()
    plain(ids)
    assert not calls


def test_where_a_kernel_of_ligers_fails_ours_takes_the_place(monkeypatch, capsys):
    liger_in_torch(monkeypatch)

    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(liger, "gated_silu", fails)
    model = make_model("llama")
    assert replace_frozen(model.modules(), list(model.modules())) == {"LlamaRMSNorm": "Liger's", "LlamaMLP": "ours"}
    assert "a fused layer fails here (RuntimeError); it is left out" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_ligers_norms_are_tried_on_both_sides_of_its_switch(monkeypatch, family):
    """Behind 32768 rows Liger takes another kernel for narrow norms, as a head's are: here one that is wrong."""
    liger_in_torch(monkeypatch)
    right = liger.norms

    def wrong_for_many(weight, epsilon):
        return [lambda x, norm=norm: norm(x) * (2.0 if x.shape[:-1].numel() >= 1 << 15 else 1.0)
                for norm in right(weight, epsilon)]  # fmt: skip

    monkeypatch.setattr(liger, "norms", wrong_for_many)
    replaced = replace_frozen(make_model(family).modules(), [])
    assert {whose for name, whose in replaced.items() if "Norm" in name} == {"ours"}
    assert liger.rows_to_try(257) == (5,)
    assert max(liger.rows_to_try(256)) > 1 << 15


def liger_rotary(q, k, cos, sin):
    """Liger's formula: the first half of cos and sin serves both halves."""
    cos, sin = (torch.cat([x.chunk(2, dim=-1)[0]] * 2, dim=-1) for x in (cos, sin))
    return llama_rotary(q, k, cos, sin)


@pytest.mark.parametrize(("alike", "calls"), [(True, 1), (False, 0)])
def test_ligers_rotary_is_for_angles_that_come_in_pairs(monkeypatch, alike, calls):
    """It takes the place of a family's on trial; angles that differ between the halves go to ours."""
    liger_in_torch(monkeypatch)
    model, used = make_model("llama"), []
    monkeypatch.setattr(liger, "rotary", liger_rotary)
    replace_frozen(model.modules(), list(model.modules()))
    module = next(module for module in model.modules() if hasattr(module, "q_proj"))
    rotary = module.forward.__func__.__globals__["apply_rotary_pos_emb"]
    assert rotary.fused, "the trial's own angles come in pairs"
    monkeypatch.setattr(liger, "rotary", lambda *given: (used.append(1), liger_rotary(*given))[1])
    q, k, cos, sin = torch.randn(4, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    cos, sin = cos[:, 0], sin[:, 0]
    if alike:
        cos, sin = (torch.cat([x[..., :4]] * 2, dim=-1) for x in (cos, sin))
    for given, wanted in zip(rotary(q, k, cos, sin), llama_rotary(q, k, cos, sin), strict=True):
        torch.testing.assert_close(given, wanted)
    assert len(used) == calls


def test_what_the_start_says():
    assert explain_fused({}) == "none, the family's own run"
    said = explain_fused({"LlamaRMSNorm": "Liger's", "LlamaMLP": "ours", "Other": "Liger's"})
    assert said == "ours for LlamaMLP; Liger's for LlamaRMSNorm, Other"
