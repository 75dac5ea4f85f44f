"""What a rank trains on in a step, and the next step's made ready while the device is still at this one's."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ptp_ds.backbone.trunks import RowPlan
from ptp_ds.packing.row import PackedRow
from ptp_ds.packing.transfer import Move, moved
from ptp_ds.perturb import Noise
from ptp_ds.training.meter import Shares


@dataclass(frozen=True)
class Drawn:
    """rows: a packed row for each micro-batch (training.micro_batches); plans: how each goes through the layers
    (Backbone.plan). places: each row's examples among this rank's; lengths: tokens of each of this rank's examples.
    global_count: the batch's examples on all ranks.
    """

    rows: tuple[PackedRow, ...]
    places: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    shares: Shares
    noise: Noise
    global_count: int
    plans: tuple[RowPlan | None, ...]

    @property
    def examples(self) -> int:
        """Examples of this rank."""
        return len(self.lengths)

    def mapped(self, move: Move) -> "Drawn":
        """See Movable."""
        plans = tuple(None if plan is None else plan.mapped(move) for plan in self.plans)
        return replace(self, rows=tuple(row.mapped(move) for row in self.rows), plans=plans)

    def to(self, device: torch.device) -> "Drawn":
        """The same with rows and plans on `device`, in one copy that nobody waits for."""
        return moved(self, device)

    def parted(self, carried_TH: Tensor | None) -> list[Tensor | None]:
        """Each row's part of what lies in this rank's order, [T, H]."""
        if carried_TH is None:
            return [None] * len(self.rows)
        parts = carried_TH.split(self.lengths)
        return [torch.cat([parts[place] for place in places]) for places in self.places]

    def joined(self, deltas: Sequence[Tensor | None]) -> Tensor | None:
        """[T, H] each row's deltas in this rank's order; None where none are carried on."""
        found: dict[int, Tensor] = {}
        for places, delta in zip(self.places, deltas, strict=True):
            if delta is None:
                return None
            parts = delta.split([self.lengths[place] for place in places])
            found |= dict(zip(places, parts, strict=True))
        return torch.cat([found[place] for place in range(len(self.lengths))])


Key = TypeVar("Key", bound=Hashable)
Made = TypeVar("Made")


class Ahead(Generic[Key, Made]):
    """Makes what a step trains on before the step comes to it: between the launch of a backward and the wait for it.

    The host has nothing to do then. A thread would share the interpreter with the launches, and gain nothing more.
    make: a step's key, its number or more -> what it trains on; it must depend on nothing but that key.
    """

    def __init__(self, make: Callable[[Key], Made]) -> None:
        self._make = make
        self._made: dict[Key, Made] = {}

    def prepare(self, key: Key) -> None:
        """Makes what `take` will give for that step."""
        self._made = {key: self._make(key)}

    def take(self, key: Key) -> Made:
        """The step's, made now where it was not prepared."""
        made, self._made = self._made, {}
        return made[key] if key in made else self._make(key)
