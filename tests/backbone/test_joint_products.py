"""Joint products: the layers' own values and gradients, fewer products, one copy of the weights, nothing left over."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ptp_ds.backbone import joint_products
from ptp_ds.backbone.activations import SavedBytes
from ptp_ds.backbone.adjacent import lay_together
from ptp_ds.backbone.frozen_linear import onednn, torchs
from ptp_ds.backbone.joint_products import Siblings
from tests.support.products import Products
from tests.support.reference import relative_error

PRODUCTS = [torchs, pytest.param(onednn, marks=pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"))]  # fmt: skip
SIZES = {"grouped": (8, 4, 4), "equal": (8, 8), "wide": (24, 24), "heads": (8, 8, 8)}
WIDE = 8


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def siblings(sizes="grouped", biased=False, product=torchs, dtype=torch.float32):
    """(the group, its layers, the same layers on their own)."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDE, size, biased, dtype=dtype).requires_grad_(False) for size in SIZES[sizes]]
    alone = copy.deepcopy(layers)
    assert lay_together([layer.weight for layer in layers])
    assert not biased or lay_together([layer.bias for layer in layers])
    return Siblings(layers, product), layers, alone


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("used", ["all", "first", "last two"])
def test_gradcheck(sizes, biased, used):
    _, layers, _ = siblings(sizes, biased, dtype=torch.float64)
    chosen = {"all": slice(None), "first": slice(1), "last two": slice(-2, None)}[used]
    x = numbers(2, 3, WIDE, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(layer(x) for layer in layers)[chosen], [x])


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("shape", [(1, 7), (2, 65), (1, 0), (1, 1)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_the_layers_own(sizes, biased, shape, product):
    """Of inputs and gradients that aren't contiguous, in fp32 and, with torch's product, in half precision."""
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        if product is onednn and dtype != torch.float32:
            continue
        group, layers, alone = siblings(sizes, biased, product, dtype)
        x = numbers(*shape[::-1], WIDE, dtype=dtype).transpose(0, 1).requires_grad_()
        found, wanted = [layer(x) for layer in layers], [layer(x) for layer in alone]
        assert not group._waiting
        grads = [numbers(out.shape[-1], *shape, dtype=dtype).movedim(0, -1) for out in wanted]
        (to_x,) = torch.autograd.grad(found, x, grads)
        (expected,) = torch.autograd.grad(wanted, x, grads)
        assert [out.shape for out in found] == [out.shape for out in wanted]
        if x.numel():
            errors = [
                relative_error(a.detach().float(), b.detach().float())
                for a, b in zip((*found, to_x), (*wanted, expected), strict=True)
            ]
            assert max(errors) < most


@pytest.mark.parametrize(("sizes", "forward", "backward"), [
    ("grouped", {"mm": 1}, {"cat": 1, "mm": 1}),
    ("wide", {"bmm": 1}, {"mm": 1, "addmm_": 1}),
    ("heads", {"bmm": 1}, {"mm": 1, "addmm_": 2}),
])  # fmt: skip
def test_one_product_and_no_sum_of_gradients(sizes, forward, backward):
    """Gradients are joined where that moves fewer numbers than adding products up, else added as they are written."""
    _, layers, _ = siblings(sizes)
    x = numbers(1, 9, WIDE).requires_grad_()
    with Products() as counts:
        out = [layer(x) for layer in layers]
    assert {name: counts.times[name] for name in ("mm", "bmm", "addmm") if counts.times[name]} == forward
    with Products() as counts:
        torch.autograd.grad(out, x, [torch.ones_like(part) for part in out])
    asked = ("cat", "mm", "bmm", "addmm_", "add", "add_")
    assert {name: counts.times[name] for name in asked if counts.times[name]} == backward


def test_what_isnt_used_has_no_gradient_product():
    """In the last layer keys and values of scored positions are thrown away."""
    _, (query, key, value), _ = siblings()
    x = numbers(1, 9, WIDE).requires_grad_()
    out, *_ = query(x), key(x), value(x)
    with Products() as counts:
        torch.autograd.grad(out.sum(), x)
    assert (counts.products, counts.times["cat"]) == (1, 0)


@pytest.mark.parametrize("sizes", ["grouped", "equal"])
def test_an_output_may_be_changed_in_place(sizes):
    """Some families add to what a layer gives: it must be no view, and its siblings must not see it."""
    _, layers, alone = siblings(sizes)
    x = numbers(1, 3, WIDE).requires_grad_()
    found, wanted = [layer(x) for layer in layers], [layer(x) for layer in alone]
    found[0].add_(1.0).mul_(2.0)
    torch.testing.assert_close(found, [2 * (wanted[0] + 1.0), *wanted[1:]])
    to_x = [torch.autograd.grad(sum(out.cos().sum() for out in outs), x)[0] for outs in (found, [2 * (wanted[0] + 1.0),
            *wanted[1:]])]  # fmt: skip
    torch.testing.assert_close(*to_x)


def test_nothing_is_kept_for_backward():
    _, layers, _ = siblings()
    saved, x = SavedBytes(iter([])), numbers(1, 9, WIDE).requires_grad_()
    with saved.counting():
        for layer in layers:
            layer(x)
    assert saved.total == 0


def test_another_tensor_has_a_product_of_its_own():
    """Equal numbers in another object, the same object with other numbers, or with another graph."""
    _, (first, second, third), (own, other, last) = siblings()
    x = numbers(1, 3, WIDE)
    first(x)
    assert torch.equal(second(x.clone()), other(x))
    first(x)
    x.mul_(2.0)
    torch.testing.assert_close(second(x), other(x))
    x = numbers(1, 3, WIDE).requires_grad_()
    with torch.no_grad():
        first(x)
    assert second(x).grad_fn is not None
    x.detach_()
    torch.testing.assert_close(third(x), last(x))
    torch.testing.assert_close(first(x), own(x))
    with torch.inference_mode():
        y = numbers(1, 3, WIDE)
        torch.testing.assert_close([first(y), second(y), third(y)], [own(y), other(y), last(y)])


@pytest.mark.parametrize("taken", [1, 2, 3])
@pytest.mark.parametrize("graph", [False, True])
def test_parts_are_gone_with_their_input_or_once_taken(taken, graph):
    group, layers, _ = siblings()
    x = numbers(1, 64, WIDE).requires_grad_(graph) * 2
    for layer in layers[:taken]:
        layer(x)
    waiting = list(group._waiting.values())
    assert sum(len(one.parts) for one in waiting) == 3 - taken
    alive = [weakref.ref(part) for one in waiting for part in one.parts.values()]
    del x
    gc.collect()
    assert not any(one.parts for one in waiting)
    assert not any(part() is not None for part in alive)


def test_parts_whose_graph_keeps_their_input_are_gone_at_the_next_call():
    group, (query, *_), _ = siblings()
    query(numbers(1, 64, WIDE).requires_grad_())
    (waiting,) = group._waiting.values()
    alive = [weakref.ref(part) for part in waiting.parts.values()]
    del waiting
    with torch.no_grad():
        query(numbers(1, 1, WIDE) * 2)
    gc.collect()
    assert not any(part() is not None for part in alive)


def test_threads_have_products_of_their_own():
    """Two threads in the middle of their siblings, with the same tensor and with others."""
    _, layers, alone = siblings()
    barrier, shared, errors = threading.Barrier(4), numbers(1, 64, WIDE), []

    def work(number):
        x = shared if number < 2 else numbers(1, 60 + number, WIDE)
        for _ in range(50):
            found = []
            for layer in layers:
                barrier.wait()
                found.append(layer(x))
            errors.append(max(relative_error(a, own(x)) for a, own in zip(found, alone, strict=True)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 200
    assert max(errors) < 1e-6


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_recomputation_that_stops_early(needed):
    """Nothing behind the last saved tensor is computed again: siblings may never come."""
    _, layers, alone = siblings()
    x = numbers(1, 5, WIDE)

    def of(layers):
        def call(x):
            return sum(layer(x).sin().sum() for layer in layers[:needed]) + layers[-1](x).sum()

        leaf = x.clone().requires_grad_()
        for _ in range(2):
            checkpoint(lambda x: call(x * 2), leaf, use_reentrant=False).backward()
        return leaf.grad

    torch.testing.assert_close(of(layers), of(alone))


def test_weights_that_were_exchanged_serve():
    """A trained one gets its gradient, moved ones are found where they are; none is taken for another."""
    _, layers, alone = siblings()
    x = numbers(1, 3, WIDE)
    trained = nn.Parameter(numbers(4, WIDE))
    layers[0](x)
    out = torch.func.functional_call(layers[1], {"weight": trained}, (x,))
    torch.testing.assert_close(out, F.linear(x, trained))
    assert torch.autograd.grad(out.sum(), trained)[0] is not None
    layers[1].weight.data = layers[1].weight.data.clone()
    torch.testing.assert_close([layer(x) for layer in layers], [layer(x) for layer in alone])
    for module in (*layers, *alone):
        module.double()
    torch.testing.assert_close([layer(x.double()) for layer in layers], [layer(x.double()) for layer in alone])


class Attention(nn.Module):
    """Layers whose inputs or parameters differ in one way or another: only b and c are siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDE, WIDE) for _ in range(3))
        self.other, self.again, self.plain = nn.Linear(WIDE, 4), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 4, bias=False)
        self.tied, self.second = nn.Linear(WIDE, 4), nn.Linear(WIDE, 4)
        self.second.weight = self.tied.weight
        self.before, self.behind = nn.Linear(WIDE, 4), nn.Linear(WIDE, 4)

    def forward(self, x):
        y, z, w = x + 1, x + 2, x + 3
        kept = self.a(x) + self.b(y) + self.c(y) + self.again(self.again(z))
        changed = x + 5
        self.before(changed)
        self.behind(changed.mul_(2.0))
        return kept, self.other(w), self.plain(w), self.tied(x + 4), self.second(x + 4)


def test_layers_that_share_an_input_are_found_by_running_them():
    torch.manual_seed(0)
    layer = Attention().requires_grad_(False)
    calls = joint_products._Calls(layer)
    layer(numbers(1, 3, WIDE))
    calls.remove()
    names = {module: name for name, module in layer.named_modules()}
    groups = [[names[module] for module in group] for group in calls.groups()]
    assert groups == [["b", "c"], ["other", "plain"]]
    assert [joint_products._may_join(group, layer) for group in calls.groups()] == [True, False], "biases on some only"
    assert not joint_products._may_join((layer.tied, layer.second), layer), "one parameter can't be at two places"
    layer.c.weight.requires_grad_(True)
    assert not joint_products._may_join((layer.b, layer.c), layer)
    assert not layer.b._forward_pre_hooks
