"""AdamW for several prompts in one flat vector: each its own rate, decay and clipping (Loshchilov, Hutter 2019).

DeepSpeed hands an optimizer this rank's part of one flat fp32 vector, cut without regard to members.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptp_ds.packing.transfer import to_device
from ptp_ds.ranks.distributed import Ranks

_SMALL = 1e-6  # beside the norm in the clipping factor, as DeepSpeed has it
_BETAS, _EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class MemberRate:
    """How one member's prompt moves in a step. max_norm: l2 norm its gradient is clipped to, 0 for none."""

    lr: float
    weight_decay: float = 0.0
    max_norm: float = 0.0


class MemberAdamW(torch.optim.Optimizer):
    """sizes: numbers of each member's prompt, in order; they lie one behind the other, padding behind the last.

    `rates` is set before every step, one for each member; a member whose lr is 0 stays as it is. `broken` [members],
    on the device: those whose gradient is not finite on this rank, if any; one that is broken on any rank stays as it
    is, its moments, too. `norms` [members] holds the norms of the last step's gradients before clipping, over all
    ranks, on the device; those of the broken are NaN.
    """

    def __init__(self, params: Any, sizes: Sequence[int], ranks: Ranks) -> None:
        super().__init__(params, {"lr": 0.0, "betas": _BETAS, "eps": _EPS, "weight_decay": 0.0})
        self.sizes, self.ranks = tuple(sizes), ranks
        self.rates: Sequence[MemberRate] = [MemberRate(0.0)] * len(self.sizes)
        self.norms = torch.zeros(len(self.sizes), device=ranks.device)
        self.broken: Tensor | None = None
        self._offsets: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the part that DeepSpeed has put into the only group; all ranks must call it."""
        (part,) = self.param_groups[0]["params"]
        gradient = part.grad
        if gradient is None:
            return
        offsets = self._offsets_of(part.numel())
        squares = torch.segment_reduce(gradient.float().square(), "sum", offsets=offsets, unsafe=True)[:-1]
        if self.broken is not None:
            squares = torch.where(self.broken.to(squares.device), torch.nan, squares)
            self.broken = None
        self.norms = self.ranks.sum(squares).sqrt()
        whole = self.norms.isfinite()
        rates = torch.tensor([(rate.lr, rate.lr * rate.weight_decay, rate.max_norm) for rate in self.rates])
        (values,) = to_device([rates], part.device)
        lr, decay, most = torch.where(whole[:, None], values, 0.0).unbind(1)
        clip = torch.where(most > 0, (most / (self.norms + _SMALL)).clamp(max=1.0), 1.0)
        clip, moves = torch.where(whole, clip, 0.0), whole.float()
        lr_n, decay_n, clip_n, moves_n = (self._spread(x, offsets, part.numel()) for x in (lr, decay, clip, moves))
        state = self.state[part]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(part), torch.zeros_like(part)
        state["step"] += 1
        self._move(part, gradient * clip_n, lr_n, decay_n, moves_n, state)

    def _move(
        self, part: Tensor, gradient: Tensor, lr: Tensor, decay: Tensor, moves: Tensor, state: dict[str, Tensor]
    ) -> None:
        """moves: 0 for a number that keeps its moments, 1 for the others."""
        (first, second), steps = _BETAS, float(state["step"])
        state["exp_avg"].lerp_(gradient, (1 - first) * moves)
        state["exp_avg_sq"].mul_(1 - (1 - second) * moves).addcmul_(gradient, gradient, value=1 - second)
        root = (state["exp_avg_sq"].sqrt() / (1 - second**steps) ** 0.5).add_(_EPS)
        part.mul_(1 - decay).sub_(lr / (1 - first**steps) * state["exp_avg"] / root)

    def _offsets_of(self, count: int) -> Tensor:
        """[members + 2] where members' numbers, then padding, begin in this rank's part of `count`, and its end."""
        if count not in self._offsets:
            begin, place, found = count * self.ranks.rank, 0, []
            for size in (*self.sizes, 0):
                found.append(min(max(place - begin, 0), count))
                place += size
            self._offsets[count] = torch.tensor([*found, count], device=self.norms.device)
        return self._offsets[count]

    def _spread(self, values: Tensor, offsets: Tensor, count: int) -> Tensor:
        """[count] each number's member's value, 0 for padding."""
        padded = torch.cat([values, values.new_zeros(1)])
        return padded.repeat_interleave(offsets.diff(), output_size=count)
