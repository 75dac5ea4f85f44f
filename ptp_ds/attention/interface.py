"""The tree's attention behind transformers' AttentionInterface: what a call sees, and what it is refused for."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ptp_ds.attention.plan import Plan
from ptp_ds.attention.tree import KeysValues, attend_tree
from ptp_ds.errors import UserError

T = TypeVar("T")
# transformers makes no mask at all for an attention that has registered none. With one, it first reads on the host
# whether positions run on, at every forward, which waits for the device; so only the start-up check's has one.
ATTENTION_NAME = "ptp_tree"
_CHECKED_NAME = "ptp_tree_with_masks"
# Keywords that families hand to their attention function and that change nothing here: dropout is checked to be 0,
# positions are already in the rotated keys, the rest are outputs or hints for other kernels.
_INERT_KEYWORDS = frozenset(
    {"output_attentions", "output_hidden_states", "use_cache", "return_dict", "is_causal", "position_ids",
     "cache_position", "logits_to_keep", "output_router_logits", "num_items_in_batch", "deterministic"}
)  # fmt: skip


class KeysReady(Exception):  # noqa: N818 - a signal, not an error
    """Ends a layer's forward once its keys and values are known; see Call.keys_only."""


@dataclass
class Call:
    """How one layer attends now: its plan, where prefix keys come from, and what to hand back.

    prefix: keys and values [P, heads, d] of each attention call of the layer, in order, or None where the prefix is in
    the row. keys: the row's own, computed before, for queries that are fewer than its tokens. keys_only: stop
    with KeysReady at the first attention call. recorded: filled with every call's keys and values, with their graph.
    """

    plan: Plan
    prefix: Sequence[KeysValues] | None = None
    keys: KeysValues | None = None
    keys_only: bool = False
    recorded: list[KeysValues] = field(default_factory=list)
    windows: set[int | None] = field(default_factory=set)


_current: ContextVar[Call | None] = ContextVar("ptp_tree_call", default=None)
_local_sizes: ContextVar[set[int] | None] = ContextVar("ptp_local_sizes", default=None)


@contextmanager
def use_value(variable: ContextVar[T | None], value: T) -> Iterator[T]:
    """`variable` is `value` inside."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def use_call(call: Call) -> AbstractContextManager[Call]:
    """Every attention call inside follows `call`."""
    return use_value(_current, call)


def _tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **others: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature: q, k, v [1, heads, P + T, d] -> ([1, P + T, heads, d], None).

    s_aux: transformers' name for sinks, a logit for each query head.
    """
    call = _current.get()
    name = type(module).__name__
    if call is None:
        raise UserError(
            f"{name} was called outside a packed pass; score through ptp_ds.backbone.backbone, not the bare model."
        )
    unknown = {word for word, value in others.items() if value is not None and word not in _INERT_KEYWORDS}
    if unknown:
        raise UserError(f"{name} hands attention {sorted(unknown)}, which packed attention doesn't know: refused.")
    if dropout or attention_mask is not None:
        raise UserError(f"{name} asks for dropout {dropout} or a mask of its own; a frozen packed row has neither.")
    if query.shape[0] != 1:
        raise UserError(f"{name} got {query.shape[0]} rows; a packed batch is one row.")
    # squeeze, not x[0]: the backward of a selection fills a whole tensor with zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    prefix = call.prefix[len(call.recorded)] if call.prefix is not None else None
    call.windows.add(sliding_window)
    call.recorded.append((k, v))
    if call.keys_only:
        raise KeysReady
    if call.keys is not None:
        k, v = call.keys
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    out = attend_tree(q, k, v, call.plan, prefix, scale=scale, softcap=softcap, window=sliding_window, sinks=s_aux)
    return out[None], None


def _no_mask(*_: object, local_size: int | None = None, **__: object) -> None:
    """The mask hook: the tree needs no mask; a local window that a family asks for is noted for the start-up check."""
    seen = _local_sizes.get()
    if seen is not None and local_size is not None:
        seen.add(int(local_size))


@contextmanager
def masks_seen(model: Any) -> Iterator[set[int]]:
    """Inside, a model that attends by ATTENTION_NAME asks for its masks, and gets none. Yields the local windows asked
    for so far."""
    model.set_attn_implementation(_CHECKED_NAME)
    try:
        with use_value(_local_sizes, set()) as seen:
            yield seen
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


for _name in (ATTENTION_NAME, _CHECKED_NAME):
    AttentionInterface.register(_name, _tree_attention)
AttentionMaskInterface.register(_CHECKED_NAME, _no_mask)
