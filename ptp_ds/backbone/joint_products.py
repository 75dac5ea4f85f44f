"""One product for frozen linear layers that are given the same tensor: queries, keys and values; gate and up.

No family's code is copied or patched. A layer that is called with a tensor computes its siblings' products in one go
and keeps them until they are called with that very tensor; which layers are siblings shows when the model is run once.
A layer that is called with anything else computes its own product, so that nothing depends on the order of calls.

The siblings' weights are moved into one memory, in which each stays a view: there is no second copy. Where weights are
gathered by collectives this isn't possible, and products stay apart.
"""

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptp_ds.backbone.adjacent import joined, lay_together
from ptp_ds.backbone.backbone import Backbone, decoder_layers
from ptp_ds.backbone.frozen_linear import Product, product_for, torchs
from ptp_ds.backbone.plain import eager
from ptp_ds.ranks.faults import befell

_TOKENS = 4  # of the run that shows which layers share an input
_CLOSE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # relative l2 distance of logits, 1e-4 in fp32 or better


class JointLinear(torch.autograd.Function):
    """x [..., I] -> x W^T + bias [..., O] for each of several frozen weights W [O, I], no gradient but x's.

    joint [sum O, I], bias [sum O] or None: the weights' and biases' parameters as one (see joined); nothing else is
    kept. Equal sizes without biases are one batched product, each part of which lies alone, as fused kernels want it;
    else parts are columns of one product.
    """

    @staticmethod
    def forward(ctx, x, joint, bias, weights, product):  # type: ignore[override]
        ctx.weights, ctx.product = weights, product
        ctx.set_materialize_grads(False)
        lead, flat, sizes = x.shape[:-1], x.reshape(-1, x.shape[-1]), [weight.shape[0] for weight in weights]
        if bias is None and product is torchs and len(set(sizes)) == 1:
            out = torch.bmm(flat.expand(len(sizes), -1, -1), joint.view(len(sizes), sizes[0], -1).transpose(1, 2))
            return tuple(torch.ops.aten._unsafe_view(part, [*lead, sizes[0]]) for part in out.unbind())
        out = product(flat, joint, bias)
        # No views of one tensor: some families change their layers' outputs in place.
        return tuple(torch.ops.aten.unsafe_split_with_sizes(out.view(*lead, sum(sizes)), sizes, -1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):  # type: ignore[override]
        pairs = [(grad, weight) for grad, weight in zip(grads, ctx.weights, strict=True) if grad is not None]
        return (input_gradient(*zip(*pairs, strict=True), ctx.product) if pairs else None), None, None, None, None


def input_gradient(grads: Sequence[Tensor], weights: Sequence[Tensor], product: Product) -> Tensor:
    """The sum of grad [..., O] W over frozen weights W [O, I]: [..., I].

    One product where joining the gradients moves fewer numbers than adding up products does; else each product is added
    to those before as it is written.
    """
    width, lead = weights[0].shape[1], grads[0].shape[:-1]
    columns = sum(weight.shape[0] for weight in weights)
    joint = joined(weights) if columns <= (len(weights) - 1) * width else None
    flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    if joint is not None:
        return product(torch.cat(flat, dim=-1), joint.t(), None).view(*lead, width)
    out = product(flat[0], weights[0].t(), None)
    for grad, weight in zip(flat[1:], weights[1:], strict=True):
        out = out.addmm_(grad, weight) if product is torchs else out.add_(product(grad, weight.t(), None))
    return out.view(*lead, width)


class _Waiting:
    """Products that siblings haven't asked for yet, and the call that they belong to; gone with its input."""

    def __init__(self, x: Tensor, parameters: Sequence[tuple[Any, Any]], parts: dict[int, Tensor]) -> None:
        self.parts, self._parameters = parts, parameters
        self._input = weakref.ref(x, lambda _: parts.clear())
        self._state = _state(x)

    def take(self, number: int, x: Tensor, module: nn.Linear) -> Tensor | None:
        """The product of sibling `number`, where it is that of its weights and x as they are now."""
        if self._input() is not x or self._state != _state(x):
            return None
        weight, bias = self._parameters[number]
        return self.parts.pop(number, None) if module.weight is weight and module.bias is bias else None


def _state(x: Tensor) -> tuple[Any, ...]:
    """What differs once x was changed in place, or is asked for with another graph."""
    return (None if x.is_inference() else x._version), torch.is_grad_enabled(), x.requires_grad


class Siblings:
    """Frozen linear layers that are called with one tensor, one after the other."""

    def __init__(self, modules: Sequence[nn.Linear], product: Product) -> None:
        self.modules, self.product = modules, product
        module: Any
        self._replaced = [vars(module).get("forward") for module in modules]
        self._own: list[Callable[[Tensor], Tensor]] = [module.forward for module in modules]
        self._waiting: dict[int, _Waiting] = {}  # by thread
        for number, module in enumerate(modules):
            module.forward = partial(self._forward, number)

    def undo(self) -> None:
        """Each layer computes its own product again."""
        module: Any
        for module, replaced in zip(self.modules, self._replaced, strict=True):
            del module.forward
            if replaced is not None:
                module.forward = replaced

    @property
    def shape(self) -> tuple[Any, ...]:
        """What groups must share for one of them to be tried for all."""
        first = self.modules[0]
        return first.in_features, first.bias is None, tuple(module.out_features for module in self.modules)

    def error(self) -> float:
        """How far values and input gradients on random numbers are from the layers' own; relative, the larger one."""
        weight = self.modules[0].weight
        generator = torch.Generator(device="cpu").manual_seed(0)
        x = torch.randn(1, _TOKENS, weight.shape[1], generator=generator).to(weight).requires_grad_()
        results = []
        for layers in (self._own, [module.forward for module in self.modules]):
            with torch.enable_grad():
                out = torch.cat([layer(x) for layer in layers], dim=-1)
            results.append((out.detach(), torch.autograd.grad(out, x, out.detach().cos())[0]))
        return max(_distance(found, own) for own, found in zip(*results, strict=True))

    def _forward(self, number: int, x: Tensor) -> Tensor:
        thread = threading.get_ident()
        waiting = self._waiting.pop(thread, None)
        part = waiting.take(number, x, self.modules[number]) if waiting is not None else None
        if waiting is not None and part is not None:
            if waiting.parts:
                self._waiting[thread] = waiting
            return part
        parameters = [(module.weight, module.bias) for module in self.modules]
        joint, bias = _as_one(x, parameters)
        if joint is None:
            return self._own[number](x)
        weights = [weight for weight, _ in parameters]
        parts = dict(enumerate(JointLinear.apply(x, joint, bias, weights, self.product)))
        part = parts.pop(number)
        self._waiting[thread] = _Waiting(x, parameters, parts)
        return part


def _as_one(x: Tensor, parameters: Sequence[tuple[Any, Any]]) -> tuple[Tensor | None, Tensor | None]:
    """(weights, biases if any) as one; no weights where one product doesn't serve them as they are now.

    Others may have been put in their place, or they may have been moved.
    """
    weights, biases = zip(*parameters, strict=True)
    given = [bias for bias in biases if bias is not None]
    if any(tensor.requires_grad or tensor.dtype != x.dtype for tensor in (*weights, *given)):
        return None, None
    bias = joined(given) if given else None
    if given and (len(given) < len(biases) or bias is None):
        return None, None
    return joined(weights), bias


def join_products(backbone: Backbone) -> None:
    """Joins products of the backbone where that is wanted (Backbone.joint) and possible; says in Backbone.joined which.

    The model is run on a few tokens to see which layers share an input, and once more to see that it still computes the
    same. A second call does nothing.
    """
    if backbone.joined:
        return
    wanted = backbone.joint if backbone.joint is not None else backbone.device.type == "cuda"
    if not wanted:
        backbone.joined = "each alone"
        return
    if backbone.shards.sharded and not backbone.shards.shared:
        backbone.joined = "each alone, since weights are gathered"
        return
    backbone.joined = "each alone, since no two share an input"
    calls = _Calls(backbone.model)
    try:
        before = _logits(backbone)
    except Exception as error:  # a forward that wants more than tokens
        if befell(error):
            raise
        return
    finally:
        calls.remove()
    product = product_for(backbone.kernels, backbone.device, backbone.dtype)[0]
    groups = [group for group in calls.groups() if _may_join(group, backbone.model)]
    made = [Siblings(group, product) for group in groups if _lie_together(group)]
    if not made:
        return
    if backbone.device.type == "cuda":
        torch.cuda.empty_cache()  # what the weights lay in before is of other sizes than what comes
    try:
        same = _all_agree(made, backbone) and _distance(_logits(backbone), before) <= _CLOSE.get(backbone.dtype, 1e-4)
    except RuntimeError as error:  # a family that views what it is given in a way that columns don't allow
        if befell(error):
            raise
        same = False
    if same:
        backbone.joined = _names(made, backbone.model)
        return
    for siblings in made:
        siblings.undo()
    backbone.joined = "each alone, since one for all differs here"


class _Calls:
    """Notes which linear layers are called with which tensor until it is removed."""

    def __init__(self, model: nn.Module) -> None:
        self._inputs: list[Tensor] = []  # alive, so that no other tensor is taken for one of them
        self._of: dict[tuple[int, int, int], list[nn.Linear]] = {}
        pairs = {(id(parent), id(child)): (parent, child) for parent in model.modules()
                 for child in parent.children() if type(child) is nn.Linear}  # fmt: skip
        self._places = {child: place for place, (_, child) in enumerate(pairs)}
        self._hooks = [
            child.register_forward_pre_hook(partial(self._note, id(parent))) for parent, child in pairs.values()
        ]

    def _note(self, parent: int, module: nn.Linear, inputs: tuple[Any, ...]) -> None:
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            self._inputs.append(inputs[0])
            self._of.setdefault((parent, id(inputs[0]), inputs[0]._version), []).append(module)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def groups(self) -> list[tuple[nn.Linear, ...]]:
        """Layers of one module that were always called with one tensor, in the module's order."""
        found = {}
        for called in self._of.values():
            group = sorted({id(module): module for module in called}.items(), key=lambda item: self._places[item[0]])
            found[tuple(number for number, _ in group)] = tuple(module for _, module in group)
        times = Counter(number for numbers in found for number in numbers)
        return [group for numbers, group in found.items() if len(group) > 1 and all(times[n] == 1 for n in numbers)]


def _parameters(group: Sequence[nn.Linear]) -> list[list[Any]]:
    """The group's weights and, if it has any, its biases."""
    kinds: list[list[Any]] = [[module.weight for module in group], [module.bias for module in group]]
    return [kind for kind in kinds if kind[0] is not None]


def _lie_together(group: Sequence[nn.Linear]) -> bool:
    """Whether one product can take the group's parameters; they are moved where the device has memory for a copy."""
    try:
        return all(map(lay_together, _parameters(group)))
    except torch.OutOfMemoryError:
        return False


def _may_join(group: Sequence[nn.Linear], model: nn.Module) -> bool:
    """Whether the layers are frozen, of one dtype, with biases all or none, and no parameter belongs to another."""
    parameters: list[Any] = [parameter for module in group for parameter in (module.weight, module.bias)]
    given = [parameter for parameter in parameters if parameter is not None]
    if len({module.bias is None for module in group}) > 1 or len({parameter.dtype for parameter in given}) > 1:
        return False
    if any(parameter.requires_grad for parameter in given):
        return False
    wanted = set(map(id, given))
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if id(p) in wanted)
    return all(owners[number] == 1 for number in wanted) and len(wanted) == len(given)


@torch.no_grad()
def _logits(backbone: Backbone) -> Tensor:
    """Those of a few tokens by the family's own forward."""
    ids = torch.arange(_TOKENS, device=backbone.device)[None] % backbone.vocabulary
    given: dict[str, Any] = {"use_cache": False} if backbone.head.kind in ("causal", "seq2seq") else {}
    if backbone.head.kind == "seq2seq":
        given["decoder_input_ids"] = ids
    with backbone.shards.outside_layers(), eager(backbone):
        return backbone.model(input_ids=ids, **given).logits.float()


def _all_agree(made: Sequence[Siblings], backbone: Backbone) -> bool:
    """Whether joint products have the values and gradients of each layer's own: one group of every shape is tried."""
    shards, close, shapes = backbone.shards, _CLOSE.get(backbone.dtype, 1e-4), set()
    layers = enumerate(decoder_layers(backbone.model))
    number_of = {id(module): number for number, layer in layers for module in layer.modules()}
    for siblings in made:
        if siblings.shape in shapes:
            continue
        shapes.add(siblings.shape)
        number = number_of.get(id(siblings.modules[0]))
        with shards.outside_layers() if number is None else shards.layer(number):
            if not siblings.error() <= close:
                return False
    return True


def _distance(found: Tensor, wanted: Tensor) -> float:
    """Relative, in l2."""
    return float((found - wanted).float().norm() / wanted.float().norm().clamp_min(1e-30))


def _names(made: Sequence[Siblings], model: nn.Module) -> str:
    """The joined layers, by their own names, in a few words."""
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    kinds = Counter("+".join(names[id(module)] for module in siblings.modules) for siblings in made)
    return "one for " + ", ".join(f"{kind} ({count} times)" for kind, count in kinds.items())
