"""Frozen layers over a packed row, section by section: what a layer computes once, keeps, recomputes and shares.

A pass through the model carries sections: the shared prefix (the prompt), then runs of consecutive rows of the clean
and of the perturbed stream. Each layer is one autograd function over all of them, so that

- its weights are needed once forward and once backward, whatever the number of sections (ptp_ds.backbone.sharding);
- the prefix's keys and values are computed once and their gradient is summed over all rows of both streams;
- a section passed before (the clean rows, when only the perturbation has changed) is not computed again: its
  outputs and its graph are taken from the first time;
- a layer keeps a section's graph, or only its input and computes the rest again in backward ("recompute");
- the last layer computes queries and feed-forward at scored positions only, and nothing but keys for the prefix.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ptp_ds.attention.interface import Call, KeysReady, use_call, use_value
from ptp_ds.attention.plan import Plan
from ptp_ds.attention.tree import KeysValues
from ptp_ds.backbone.sharding import Shards
from ptp_ds.models.heads import HeadInput
from ptp_ds.packing.transfer import Move
from ptp_ds.precision import at_least_fp32


@dataclass(frozen=True)
class Chunk:
    """Consecutive blocks of a packed row, or the prefix, that a layer handles in one go.

    length: its tokens. plan: how they attend; last_plan: the same for queries at `scored` positions [n] alone. targets:
    what a decoder scores behind each block (PackedRow.targets).
    """

    length: int
    plan: Plan
    last_plan: Plan | None
    scored: Tensor
    is_prefix: bool = False
    targets: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def mapped(self, move: Move) -> "Chunk":
        """See Movable."""
        last_plan = None if self.last_plan is None else self.last_plan.mapped(move)
        return replace(self, plan=self.plan.mapped(move), last_plan=last_plan, scored=move(self.scored))


@dataclass
class _Held:
    """What one layer of one section leaves for its backward and for passes that know the section already."""

    leaf: Tensor
    output: Tensor
    prefix_leaves: list[Tensor]
    own: list[KeysValues]


@dataclass(eq=False)
class Section:
    """A chunk on its way through the layers. graph: whether anything of it is differentiated.

    to_input, to_prefix: whether gradient goes to its input embeddings and to the prefix's keys and values.
    """

    chunk: Chunk
    graph: bool
    to_input: bool = True
    to_prefix: bool = True
    held: dict[int, _Held] = field(default_factory=dict)


PrefixCache = dict[int, list[KeysValues]]  # layer -> keys and values [P, heads, d] of its attention calls


def detached(pairs: Sequence[KeysValues]) -> list[KeysValues]:
    """Keys and values without their graph."""
    return [(k.detach(), v.detach()) for k, v in pairs]


@dataclass(eq=False)
class LayerPass:
    """One pass of `sections`, in order, through all layers. recomputed: the first layers, which keep their inputs alone
    and compute the rest again in backward. live: sections whose outputs get a gradient.

    prefix: the prefix's keys and values, detached; filled where the pass holds the prefix itself, or from `given`: keys
    and values that are inputs of the pass (a deep prompt), with the graph that their gradient goes back to; empty where
    rows have no prefix. head_input: what the last layer hands to the model's head (see HeadInput).
    """

    sections: Sequence[Section]
    prefix: PrefixCache
    recomputed: int = 0
    live: Sequence[Section] | None = None
    given: PrefixCache | None = None
    head_input: HeadInput = "row"
    windows: set[int | None] = field(default_factory=set)
    attention_calls: dict[int, int] = field(default_factory=dict)
    _entered: int = 0
    _outputs: tuple[Tensor, list[Tensor]] | None = None

    @cached_property
    def scored(self) -> Tensor:
        """[N] scored positions among the pass' tokens, in order."""
        places = [section.chunk.scored + start for section, (start, _) in zip(self.sections, self.spans(), strict=True)]
        return torch.cat(places)

    @property
    def scores_anything(self) -> bool:
        """Whether any position is scored: none is where a pass computes the prefix's keys alone."""
        return any(section.chunk.scored.shape[0] for section in self.sections)

    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each section among the pass' tokens."""
        spans, start = [], 0
        for section in self.sections:
            spans.append((start, start + section.chunk.length))
            start = spans[-1][1]
        return spans

    def enter(self) -> int:
        """The number of the layer that the pass comes to now: a module that is used again counts again (albert)."""
        self._entered += 1
        return self._entered - 1

    def is_live(self, section: Section) -> bool:
        """Whether the section's outputs get a gradient in this pass."""
        return section.graph and (self.live is None or any(section is other for other in self.live))


_pass: ContextVar[LayerPass | None] = ContextVar("ptp_layer_pass", default=None)


def use_layer_pass(layer_pass: LayerPass) -> AbstractContextManager[LayerPass]:
    """Layers inside follow `layer_pass`; outside of any pass they are the family's own."""
    return use_value(_pass, layer_pass)


class LayerStack:
    """A model's layers, each with its forward replaced by one that follows the current LayerPass.

    The module tree, its names and its parameters stay as they are.
    """

    def __init__(self, layers: Sequence[nn.Module], shards: Shards, count: int | None = None) -> None:
        self.modules, self.shards = len(layers), shards
        self.count = count or len(layers)  # layers of a pass: more than modules where modules are used again
        self.extras: tuple[None, ...] | None = None  # what a family's layers return behind the hidden states
        self._layers = layers
        self._originals: list[Callable[..., Any]] = [layer.forward for layer in layers]
        for number, layer in enumerate(layers):
            layer.forward = partial(self._forward, number)  # type: ignore[method-assign]

    def release(self) -> None:
        """Gives the layers their own forward back."""
        for layer in self._layers:
            del layer.forward

    def _forward(self, module: int, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer_pass = _pass.get()
        if layer_pass is None:
            with self.shards.layer(module, self.after(module)):
                return self._originals[module](hidden_states, *args, **kwargs)
        work = _LayerWork(self, module, layer_pass, args, kwargs)
        out = _LayerFunction.apply(hidden_states, work, *work.given())
        return out if self.extras is None else (out, *self.extras)

    def after(self, module: int, step: int = 1) -> int | None:
        """The module that follows (or, step -1, comes before); None at the end and where modules are used again."""
        following = module + step
        return following if self.modules == self.count and 0 <= following < self.count else None

    def original(self, module: int) -> Callable[..., Any]:
        """The family's own forward of a layer."""
        return self._originals[module]


class _LayerFunction(torch.autograd.Function):
    """[1, T, H] -> [1, T, H] through one layer; behind the last one, zero where nothing is scored.

    given: the prefix's keys and values where they are inputs of the pass, one after the other.
    """

    @staticmethod
    def forward(ctx, hidden, work, *given):  # type: ignore[override]
        ctx.work = work
        return work.forward(hidden.detach())

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        work, ctx.work = ctx.work, None
        to_input, to_prefix = work.backward(grad)
        given = len(work.given())
        return to_input, None, *(to_prefix[:given] if to_prefix else [None] * given)


class _LayerWork:
    """One layer in one pass."""

    def __init__(
        self, stack: LayerStack, module: int, layer_pass: LayerPass, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        self.stack, self.module, self.number, self.layer_pass = stack, module, layer_pass.enter(), layer_pass
        self.args, self.kwargs = args, kwargs
        self.is_last = self.number == stack.count - 1
        self.spans = layer_pass.spans()

    def forward(self, hidden: Tensor) -> Tensor:
        layer_pass = self.layer_pass
        if layer_pass.given is not None:
            layer_pass.prefix[self.number] = detached(layer_pass.given[self.number])
        inputs = self._inputs(hidden)
        outputs = []
        with self.stack.shards.layer(self.module, self.stack.after(self.module)):
            for section, span, x in zip(layer_pass.sections, self.spans, inputs, strict=True):
                held = section.held.get(self.number)
                if held is None:
                    held = self._run(section, span, x)
                    if section.graph:
                        section.held[self.number] = held
                if section.chunk.is_prefix:
                    layer_pass.prefix[self.number] = detached(held.own)
                outputs.append(held.output.detach())
        whole = torch.cat(outputs, dim=1)
        if self.is_last:
            return self._to_head_input(hidden, whole)
        layer_pass._outputs = (whole, outputs)
        return whole

    def _to_head_input(self, hidden: Tensor, scored: Tensor) -> Tensor:
        """What the head gets of the scored tokens [1, N, H]; see HeadInput."""
        if self.layer_pass.head_input == "columns":
            return scored.transpose(0, 1)
        if self.layer_pass.head_input == "scored":
            return scored
        return torch.zeros_like(hidden).index_copy_(1, self.layer_pass.scored, scored)

    def _from_head_input(self, grad: Tensor) -> Tensor:
        """The transpose of _to_head_input."""
        if self.layer_pass.head_input == "columns":
            return grad.transpose(0, 1)
        return grad if self.layer_pass.head_input == "scored" else grad.index_select(1, self.layer_pass.scored)

    def given(self) -> list[Tensor]:
        """Keys and values of this layer that are inputs of the pass, flat."""
        pairs = self.layer_pass.given[self.number] if self.layer_pass.given is not None else []
        return [tensor for pair in pairs for tensor in pair]

    def _inputs(self, hidden: Tensor) -> list[Tensor]:
        """Each section's part of `hidden`: the tensor that the layer before kept, where nothing changed in between."""
        before = self.layer_pass._outputs
        if before is not None and before[0].data_ptr() == hidden.data_ptr() and before[0].shape == hidden.shape:
            return before[1]
        return [hidden[:, start:stop] for start, stop in self.spans]

    def _run(self, section: Section, span: tuple[int, int], x: Tensor) -> _Held:
        prefix = None if section.chunk.is_prefix else self.layer_pass.prefix.get(self.number)
        with torch.set_grad_enabled(section.graph):
            leaf = x.detach().requires_grad_(section.graph and (section.to_input or self.number > 0))
            flat = [tensor.detach() for pair in prefix or () for tensor in pair]
            for tensor in flat:
                tensor.requires_grad_(section.graph and section.to_prefix)
            call = partial(self._call, section.chunk, span)
            if section.graph and self.number < self.layer_pass.recomputed:
                output, *own = checkpoint(call, leaf, *flat, use_reentrant=False, preserve_rng_state=False)
            else:
                output, *own = call(leaf, *flat)
        pairs = list(zip(own[::2], own[1::2], strict=True))
        return _Held(leaf, output, flat, pairs)

    def _call(self, chunk: Chunk, span: tuple[int, int], x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        """(output, then, for the prefix, the keys and values of each attention call)."""
        prefix = list(zip(flat[::2], flat[1::2], strict=True)) if flat else None
        if not self.is_last:
            with use_call(Call(chunk.plan, prefix)) as call:
                output = self._layer(x, slice(*span))
        else:
            with use_call(Call(chunk.plan, prefix, keys_only=True)) as call:
                with suppress(KeysReady):
                    self._layer(x, slice(*span))
            if chunk.is_prefix or chunk.last_plan is None:
                output = x[:, :0]
            else:
                keys = call.recorded[0] if call.recorded else None
                places = chunk.scored + span[0]
                with use_call(Call(chunk.last_plan, prefix, keys=keys)) as call:
                    output = self._layer(x.index_select(1, chunk.scored), places)
        self.layer_pass.windows |= call.windows
        self.layer_pass.attention_calls[self.number] = len(call.recorded)
        own = [tensor for pair in call.recorded for tensor in pair] if chunk.is_prefix else []
        return (output, *own)

    def _layer(self, x: Tensor, places: slice | Tensor) -> Tensor:
        tokens = self.spans[-1][1]
        args, kwargs = _take(self.args, places, tokens), _take(self.kwargs, places, tokens)
        result = self.stack.original(self.module)(x, *args, **kwargs)
        if isinstance(result, tuple):
            self.stack.extras = (None,) * (len(result) - 1)
            result = result[0]
        return result

    def backward(self, grad: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        """Gradients of the pass' inputs to this layer, zero where a section isn't live, and of the prefix's, if any."""
        layer_pass = self.layer_pass
        pieces: list[Tensor] = []
        if self.is_last:
            grad = self._from_head_input(grad)
        grads = grad.split([self._output_length(section.chunk) for section in layer_pass.sections], dim=1)
        prefix_grads: list[Tensor] | None = None
        with self.stack.shards.layer(self.module, self.stack.after(self.module, -1)):
            for section, piece in zip(reversed(layer_pass.sections), reversed(grads), strict=True):
                if not layer_pass.is_live(section):
                    pieces.append(piece.new_zeros(1, section.chunk.length, piece.shape[-1]))
                    continue
                held = section.held.pop(self.number)
                to_input, to_prefix = self._section_gradients(section, held, piece, prefix_grads)
                pieces.append(to_input)
                if to_prefix:
                    prefix_grads = to_prefix if prefix_grads is None else _added(prefix_grads, to_prefix)
        return torch.cat(pieces[::-1], dim=1), prefix_grads

    def _output_length(self, chunk: Chunk) -> int:
        return chunk.scored.shape[0] if self.is_last else chunk.length

    def _section_gradients(
        self, section: Section, held: _Held, grad: Tensor, prefix_grads: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """(gradient of the section's input, gradients of the prefix's keys and values)."""
        outputs, gradients = ([held.output], [grad]) if grad.shape[1] else ([], [])
        if section.chunk.is_prefix and prefix_grads is not None:
            own = [tensor for pair in held.own for tensor in pair]
            outputs, gradients = (
                outputs + own,
                gradients + [gradient.to(tensor.dtype) for gradient, tensor in zip(prefix_grads, own, strict=True)],
            )
        wanted = [tensor for tensor in (held.leaf, *held.prefix_leaves) if tensor.requires_grad]
        found = list(torch.autograd.grad(outputs, wanted, gradients)) if outputs and wanted else []
        to_input = found.pop(0) if held.leaf.requires_grad and found else torch.zeros_like(held.leaf)
        return to_input, found


def _added(sums: list[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    """fp32 sums of gradients (fp64 stays)."""
    return [at_least_fp32(a) + b for a, b in zip(sums, more, strict=True)]


def _take(value: Any, places: slice | Tensor, tokens: int) -> Any:
    """What a model hands its layers, for some of its `tokens` tokens: tensors with a token axis are cut, the rest stay.

    The token axis is the second behind a batch of one, or the only one.
    """
    if isinstance(value, Tensor):
        axis = 1 if value.dim() > 1 and value.shape[0] == 1 and value.shape[1] == tokens else 0
        if value.dim() > axis and value.shape[axis] == tokens and (axis or value.dim() == 1):
            return value.index_select(axis, places) if isinstance(places, Tensor) else _cut(value, axis, places)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_take(item, places, tokens) for item in value)
    if isinstance(value, dict):
        return {key: _take(item, places, tokens) for key, item in value.items()}
    return value


def _cut(value: Tensor, axis: int, places: slice) -> Tensor:
    return value.narrow(axis, places.start, places.stop - places.start)
