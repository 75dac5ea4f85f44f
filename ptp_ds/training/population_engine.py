"""The DeepSpeed engine around several prompts: one flat weight, and a member's own rate, clipping and failure."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptp_ds.backbone.backbone import Backbone
from ptp_ds.backbone.sharding import ResolvedDeepSpeed
from ptp_ds.prompts import SoftPrompt
from ptp_ds.ranks.distributed import Ranks
from ptp_ds.training.engine import Engine
from ptp_ds.training.member_adamw import MemberAdamW, MemberRate


class PopulationEngine(Engine):
    """rows: those of each member in the weight [their sum, W], one behind the other. lengths: those of its prompt,
    which differ where a prompt is made from something else.

    A member whose gradient is not finite sends zeros instead, so that DeepSpeed's step, which would be left out for
    all, moves the others, and tells the optimizer, which leaves the step out for it. A lone member is stepped by
    Engine's own optimizer, bit for bit; weight_decay and the configuration's clipping are for it.
    """

    def __init__(
        self, prompt: SoftPrompt, backbone: Backbone, resolved: ResolvedDeepSpeed, ranks: Ranks, rows: Sequence[int],
        weight_decay: float = 0.0, average: float = 0.0, lengths: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.rows, self._ranks = tuple(rows), ranks
        self.lengths = tuple(rows if lengths is None else lengths)
        self._now: dict[str, Any] = {}  # what was gathered since the last step
        log, untested = logging.getLogger("DeepSpeed"), "untested optimizer"  # ours is tested, here
        log.addFilter(known := lambda record: untested not in record.getMessage())
        try:
            super().__init__(prompt, backbone, resolved, ranks, weight_decay, average)
        finally:
            log.removeFilter(known)
        if len(self.rows) > 1:
            self.prompt_module.weight.register_hook(self._finite)

    def _optimizer(self, weight: Tensor, weight_decay: float) -> torch.optim.Optimizer:
        if len(self.rows) == 1:
            return super()._optimizer(weight, weight_decay)
        return MemberAdamW([weight], [rows * weight.shape[1] for rows in self.rows], self._ranks)

    def _own_config(self) -> dict[str, Any]:
        if len(self.rows) == 1:
            return {}
        return {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}

    @property
    def _members(self) -> MemberAdamW:
        assert isinstance(self._adamw, MemberAdamW)
        return self._adamw

    def _finite(self, grad_RW: Tensor) -> Tensor:
        """This rank's gradient, zero for members where its norm is not finite, of which the optimizer is told."""
        parts = grad_RW.split(self.rows)
        broken = torch.stack([~part.float().square().sum().isfinite() for part in parts])
        self._members.broken = broken
        kept = [torch.where(one, torch.zeros_like(part), part) for one, part in zip(broken, parts, strict=True)]
        return torch.cat(kept)

    def backward_sums(self, loss_sums: Sequence[Tensor], global_counts: Sequence[int]) -> None:
        """backward_sum for each member: its rank's summed loss, and its examples of the step on all ranks."""
        self.backward_joint(self.joint(loss_sums, global_counts), global_counts)

    def joint(self, loss_sums: Sequence[Tensor], global_counts: Sequence[int]) -> Tensor:
        """One loss for all members, for backward_joint; a lone member's is its sum."""
        if len(self.rows) == 1:
            return loss_sums[0]
        means = [loss / count for loss, count in zip(loss_sums, global_counts, strict=True)]
        return torch.stack(means).sum()

    def backward_joint(self, loss: Tensor, global_counts: Sequence[int]) -> None:
        """Backward of `joint`."""
        self.backward_sum(loss, global_counts[0] if len(self.rows) == 1 else 1)

    def step_members(self, rates: Sequence[MemberRate]) -> None:
        """Clips and updates each member's prompt; one whose rate is 0 stays as it is."""
        if len(self.rows) == 1:
            self.step(rates[0].lr)
        else:
            self._members.rates = rates
            self.step(0.0)
        self._now.clear()

    def grad_norms(self) -> Tensor:
        """[members] l2 norms of the last step's gradients before clipping, on the device."""
        return torch.tensor([self.grad_norm()]) if len(self.rows) == 1 else self._members.norms

    def broken_members(self) -> Sequence[Tensor | bool] | Tensor:
        """[members] Engine.broken of each."""
        return [self.broken()] if len(self.rows) == 1 else ~self._members.norms.isfinite()

    def prompt(self) -> Tensor:
        """[their sum, W] all members' prompts; gathered once between two steps."""
        if "prompt" not in self._now:
            self._now["prompt"] = super().prompt()
        return self._now["prompt"]

    def kept(self) -> Tensor:
        """Engine.kept of all members; gathered once between two steps."""
        if "kept" not in self._now:
            self._now["kept"] = super().kept()
        return self._now["kept"]

    def state(self) -> dict[str, Tensor]:
        """Engine.state of all members; gathered once between two steps."""
        if "state" not in self._now:
            self._now["state"] = super().state()
        return self._now["state"]

    def set_prompt(self, weight_RH: Tensor) -> None:
        """See Engine.set_prompt."""
        super().set_prompt(weight_RH)
        self._now.clear()


class MemberEngine:
    """What a Trainer asks its engine for, of one member: `number` among the engine's."""

    def __init__(self, engine: PopulationEngine, number: int) -> None:
        self.population, self.number = engine, number
        self.backbone = engine.backbone

    def _own(self, tensor: Tensor, rows: Sequence[int]) -> Tensor:
        return tensor.split(rows)[self.number].clone()

    def prompt(self) -> Tensor:
        """See Engine.prompt."""
        return self._own(self.population.prompt(), self.population.lengths)

    def kept(self) -> Tensor:
        """See Engine.kept."""
        return self._own(self.population.kept(), self.population.lengths)

    def state(self) -> dict[str, Tensor]:
        """See Engine.state: what a lone run's checkpoint holds."""
        return {
            name: self._own(tensor, self.population.rows) if tensor.dim() == 2 else tensor.clone()
            for name, tensor in self.population.state().items()
        }

    def broken(self) -> Tensor | bool:
        """See Engine.broken."""
        return self.population.broken_members()[self.number]

    def grad_norm(self) -> float:
        """See Engine.grad_norm."""
        return float(self.population.grad_norms()[self.number])
