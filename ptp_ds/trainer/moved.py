"""A pass whose input embeddings are moved by delta: the model takes the batch's token ids, and a hook on its embedding
adds delta to what that gives.

By ids a model does all else as in the clean pass: it counts positions, finds the padding and pools at a row's last
token, and gradient reaches an embedding that is trained. None of it is sure by `inputs_embeds`.
"""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ptp_ds.errors import UserError


class Mover:
    """The hook. parts: what is added during a moved pass, one [B, T, H], or one a device; reached: whether it was."""

    def __init__(self) -> None:
        self.parts: tuple[Tensor, ...] = ()
        self.reached = False

    def __call__(self, embedding: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        for part in self.parts:
            if part.shape == output.shape and (len(self.parts) == 1 or part.device == output.device):
                self.reached = True
                return (output + part.to(output.device)).to(output.dtype)
        return None


_movers: "WeakKeyDictionary[nn.Module, Mover]" = WeakKeyDictionary()


def mover_of(embedding: nn.Module) -> Mover:
    """The embedding's hook. It stays, and does nothing outside of moved passes: a compiled model only knows the hooks
    that it was compiled with, so the first call stands before the first pass.
    """
    if embedding not in _movers:
        _movers[embedding] = Mover()
        embedding.register_forward_hook(_movers[embedding])
    return _movers[embedding]


def moved_pass(model: nn.Module, embedding: nn.Module, delta_BTH: Tensor, batch: Mapping[str, Any]) -> Any:
    """The model's outputs for a batch with `input_ids`; UserError where they don't pass through the embedding."""
    mover = mover_of(embedding)
    for _ in range(2):
        mover.parts, mover.reached = _parts_of(model, delta_BTH), False
        try:
            outputs = model(**batch)
        finally:
            mover.parts = ()
        if mover.reached:
            return outputs
        torch.compiler.reset()  # the model was compiled before the hook stood
    raise UserError(
        f"The model doesn't look up its input_ids {list(delta_BTH.shape[:2])} in the {type(embedding).__name__} that "
        "get_input_embeddings names, where they are perturbed; take perturbation mask, or train it by `ptp train`."
    )


def _parts_of(model: nn.Module, delta_BTH: Tensor) -> tuple[Tensor, ...]:
    """delta as the model splits its batch: DataParallel gives each GPU some rows."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        scattered, _ = model.scatter((delta_BTH,), {}, model.device_ids)
        return tuple(part for (part,) in scattered)
    return (delta_BTH,)
