"""The head's product with the rows of the verbalizers alone, in place of the whole vocabulary's.

Where all candidates are single tokens, a softmax over them needs nothing else: [N, n] logits instead of [N, V]. The
model's own output embeddings do it, so that whatever a family does behind them (scales, soft caps) stays as it is.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor, nn

from ptp_ds.attention.interface import use_value
from ptp_ds.backbone.frozen_linear import torchs
from ptp_ds.precision import at_least_fp32

_columns: ContextVar[Tensor | None] = ContextVar("ptp_verbalizers", default=None)


def use_columns(columns_n: Tensor | None) -> AbstractContextManager[Tensor | None]:
    """Inside, heads that `narrow_head` prepared give the logits of these tokens, in this order; all of them for
    None."""
    return use_value(_columns, columns_n)


def narrow_head(model: Any) -> nn.Module | None:
    """Makes the model's output embeddings heed `use_columns`; None where they are no plain linear layer."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return None
    head.forward = partial(_forward, head, head.forward)  # type: ignore[method-assign]
    return head


def restore_head(head: Any) -> None:
    """Gives a head that `narrow_head` has changed its forward of before back."""
    _, before = head.forward.args
    del head.forward
    if before != head.forward:  # not the class' own (ptp_ds.backbone.frozen_linear)
        head.forward = before


def _forward(head: nn.Linear, whole: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The product in fp32 or better: a few columns cost nothing, and losses are in it anyway."""
    columns = _columns.get()
    if columns is None:
        return whole(x)
    bias = at_least_fp32(head.bias.index_select(0, columns)) if head.bias is not None else None
    return torchs(at_least_fp32(x), at_least_fp32(head.weight.index_select(0, columns)), bias)
