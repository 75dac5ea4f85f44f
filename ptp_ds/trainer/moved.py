"""A pass whose input embeddings are moved by delta: the model takes the batch's token ids, and a hook on its embedding
adds delta to what that gives for them.

By ids a model does all else as in the clean pass: it counts positions, finds the padding and pools at a row's last
token, and gradient reaches an embedding that is trained. None of it is sure by `inputs_embeds`.

A model may look up more than the batch's ids: token types, and padding of its own. So each lookup is compared with the
ids, on the device: a token is moved where its own id is looked up, and once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ptp_ds.errors import UserError


@dataclass
class Part:
    """A device's rows in a moved pass. ids [B, T]; delta [B, T, H]; found [B, T]: the tokens that the model has looked
    up so far, None before the first lookup in which they may be.
    """

    ids: Tensor
    delta: Tensor
    found: Tensor | None = None

    def steps(self, given: Tensor) -> Tensor | None:
        """What a lookup of the ids `given` is moved by; None where the batch's can't be among them. A model may append
        columns (Longformer pads to its window), or look up [T, B] (XLNet).
        """
        rows, tokens = self.ids.shape
        straight = given.dim() == 2 and given.shape[0] == rows and given.shape[1] >= tokens
        turned = given.shape == (tokens, rows)
        if not straight and not turned:
            return None
        ids, delta = self.ids.to(given.device), self.delta.to(given.device)
        turn = None
        if straight and turned:  # as many rows as tokens: the device tells how they lie
            turn = (ids == given.T).all() & ~(ids == given).all()
            given = torch.where(turn, given.T, given)
        elif turned:
            given = given.T
        hit = given[:, :tokens] == ids
        if self.found is not None:
            hit = hit & ~self.found.to(hit.device)
        self.found = hit if self.found is None else hit | self.found.to(hit.device)
        steps = torch.where(hit[..., None], delta, 0.0)
        if turn is not None:
            return torch.where(turn, steps.transpose(0, 1), steps)
        if turned:
            return steps.transpose(0, 1)
        return pad(steps, (0, 0, 0, given.shape[1] - tokens)) if given.shape[1] > tokens else steps

    def lost(self) -> int:
        """How many tokens delta moves and the model hasn't looked up. It waits for the device."""
        assert self.found is not None
        return int(((self.delta != 0).any(-1) & ~self.found.to(self.delta.device)).sum())


class Mover:
    """The hook. parts: what is added during a moved pass, one a device; checked: whether a pass has moved all."""

    def __init__(self) -> None:
        self.parts: tuple[Part, ...] = ()
        self.checked = False

    def __call__(self, embedding: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        given = next(iter((*args, *kwargs.values())))
        for part in self.parts:
            if len(self.parts) == 1 or part.delta.device == output.device:
                steps = part.steps(given.to(output.device))
                return None if steps is None else (output + steps).to(output.dtype)
        return None


_movers: "WeakKeyDictionary[nn.Module, Mover]" = WeakKeyDictionary()


def mover_of(embedding: nn.Module) -> Mover:
    """The embedding's hook. It stays, and does nothing outside of moved passes: a compiled model only knows the hooks
    that it was compiled with, so the first call stands before the first pass.
    """
    if embedding not in _movers:
        _movers[embedding] = Mover()
        embedding.register_forward_hook(_movers[embedding], with_kwargs=True)
    return _movers[embedding]


def moved_pass(model: nn.Module, embedding: nn.Module, delta_BTH: Tensor, batch: Mapping[str, Any]) -> Any:
    """The model's outputs for a batch with `input_ids`; UserError where they don't pass through the embedding."""
    mover = mover_of(embedding)
    for again in (False, True):
        if again:
            torch.compiler.reset()  # the model was compiled before the hook stood
        mover.parts = parts = _parts_of(model, batch["input_ids"], delta_BTH)
        try:
            outputs = model(**batch)
        finally:
            mover.parts = ()
        if all(part.found is not None for part in parts):
            _expect_moved(mover, parts)
            return outputs
        if not _is_compiled(model):
            break
    raise UserError(
        f"The model doesn't look up its input_ids {list(delta_BTH.shape[:2])} in the {type(embedding).__name__} that "
        "get_input_embeddings names, where they are perturbed; take perturbation mask, or train it by `ptp train`."
    )


def _expect_moved(mover: Mover, parts: tuple[Part, ...]) -> None:
    """UserError where the model looked up other ids in place of some that delta moves. It waits for the device, so it
    is asked in an embedding's first moved pass alone.
    """
    if mover.checked:
        return
    lost = sum(part.lost() for part in parts)
    if lost:
        raise UserError(
            f"The model looks up other ids than those of its input_ids in {lost} perturbed places, as some do for "
            "images; leave these out by ptp_loss's movable, or take perturbation mask."
        )
    mover.checked = True


def _is_compiled(model: nn.Module) -> bool:
    """Whether a module of the model runs compiled: wrapped by torch.compile, by its method, or in its forward."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule)
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _parts_of(model: nn.Module, ids_BT: Tensor, delta_BTH: Tensor) -> tuple[Part, ...]:
    """Ids and delta as the model splits its batch: DataParallel gives each GPU some rows."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        scattered, _ = model.scatter((ids_BT, delta_BTH), {}, model.device_ids)
        return tuple(Part(ids, delta) for ids, delta in scattered)
    return (Part(ids_BT, delta_BTH),)
